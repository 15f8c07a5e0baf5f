"""Page sources that fill without this process's GIL, for `FaultService.serve` and `lazy_array`."""

from userfault._native import Native
from userfault._source import Buffer, Constant, File, Pattern, Source, Zero
from userfault.pager import Pager

__all__ = ["Buffer", "Constant", "File", "Native", "Pager", "Pattern", "Source", "Zero"]
