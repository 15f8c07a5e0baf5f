from libc.stdint cimport UINT64_MAX, uint64_t

from userfault._source cimport Source, fill_t

# A source that fills with a C function; `owner` lives as long as it does. nbytes UINT64_MAX: without end.
# Raises SourceError when the function is NULL.
cdef Source native(fill_t fill, void *ctx, uint64_t nbytes, object owner)
