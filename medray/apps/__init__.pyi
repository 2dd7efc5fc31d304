from .check_slides import check as check
from .commands import COMMANDS as COMMANDS
from .console import as_text as as_text
