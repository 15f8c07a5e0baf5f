from typing import Final

from userfault.errors import UffdError

ROWS: Final[tuple[tuple[int, int, type[UffdError], str], ...]]

def error_for(call: str, err: int, done: int = 0) -> UffdError: ...
def decision(err: int) -> str: ...
