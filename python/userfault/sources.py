"""Page sources that fill without the GIL, for `FaultService.serve`."""

from userfault._source import Buffer, File, Source, Zero

__all__ = ["Buffer", "File", "Source", "Zero"]
