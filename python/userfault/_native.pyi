from typing import SupportsIndex

from userfault._source import Source

class Native(Source):
    def __init__(
        self,
        fn: object,
        ctx: object = None,
        nbytes: SupportsIndex | None = None,
        *,
        write: object = None,
        signal_safe: bool = False,
    ) -> None: ...
