"""Linux userfaultfd for Python, at C speed: page faults as numpy records, served without the GIL."""

from userfault import sources
from userfault._budget import Budget
from userfault._consts import (
    FORK_DTYPE,
    MSG_DTYPE,
    PAGE_SIZE,
    RANGE_DTYPE,
    REMAP_DTYPE,
    V1_DTYPE,
    V2_DTYPE,
)
from userfault._reader import EventReader, as_v2
from userfault._regions import RegionTable
from userfault._touch import touch
from userfault.children import take_children
from userfault.errors import (
    BusyError,
    ChangingError,
    ClosedError,
    EndOfRecordsError,
    ForkedError,
    LimitError,
    NotRegisteredError,
    OverlapError,
    PageExistsError,
    ProcessGoneError,
    RangeError,
    RecordError,
    SourceError,
    TruncatedRecordError,
    UffdError,
    UnavailableError,
    UnsupportedError,
    UserfaultError,
)
from userfault.flags import Api, Event, Feature, Ioctl, RegisterMode, RfcBit
from userfault.lazy import LazyArray, lazy_array
from userfault.negotiation import Capabilities, probe
from userfault.pager import Pager
from userfault.region import Region
from userfault.service import Failure, FaultService, Placement
from userfault.stats import latency_percentile
from userfault.uffd import Userfaultfd

__all__ = [
    "FORK_DTYPE",
    "MSG_DTYPE",
    "PAGE_SIZE",
    "RANGE_DTYPE",
    "REMAP_DTYPE",
    "V1_DTYPE",
    "V2_DTYPE",
    "Api",
    "Budget",
    "BusyError",
    "Capabilities",
    "ChangingError",
    "ClosedError",
    "EndOfRecordsError",
    "Event",
    "EventReader",
    "Failure",
    "FaultService",
    "Feature",
    "ForkedError",
    "Ioctl",
    "LazyArray",
    "LimitError",
    "NotRegisteredError",
    "OverlapError",
    "PageExistsError",
    "Pager",
    "Placement",
    "ProcessGoneError",
    "RangeError",
    "RecordError",
    "Region",
    "RegionTable",
    "RegisterMode",
    "RfcBit",
    "SourceError",
    "TruncatedRecordError",
    "UffdError",
    "UnavailableError",
    "UnsupportedError",
    "UserfaultError",
    "Userfaultfd",
    "as_v2",
    "latency_percentile",
    "lazy_array",
    "probe",
    "sources",
    "take_children",
    "touch",
]
