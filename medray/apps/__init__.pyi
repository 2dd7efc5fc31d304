from .check_slides import check as check
from .commands.request import Request as Request
from .commands.request import parse as parse
from .failures import explain_failure as explain_failure
