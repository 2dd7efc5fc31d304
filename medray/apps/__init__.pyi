from .check_slides import check as check
from .commands import COMMANDS as COMMANDS
