"""Page sources that fill without the GIL, for `FaultService.serve`."""

from userfault._native import Native
from userfault._source import Buffer, Constant, File, Pattern, Source, Zero

__all__ = ["Buffer", "Constant", "File", "Native", "Pattern", "Source", "Zero"]
