"""`Native`: a page source that fills with a C function, in whichever form Python has it.

Only a function that needs no Python can be one: the thread that touches the page may hold the GIL. So each
form is looked at for a Python function underneath, and for its signature where it tells one. scipy, numba
and cffi are never imported: an object of theirs shows that they are.
"""

from cpython.pycapsule cimport (
    PyCapsule_CheckExact, PyCapsule_GetContext, PyCapsule_GetName, PyCapsule_GetPointer,
)
from libc.stdint cimport UINT64_MAX, uint64_t, uintptr_t

import ctypes
import sys
from operator import index

import numpy as np

from userfault._source cimport Source, fill_t, write_t

from userfault._source import Buffer
from userfault.errors import SourceError
from userfault.procmaps import vmas

cdef extern from "<dlfcn.h>" nogil:
    ctypedef struct Dl_info:
        const char *dli_fname
    int dladdr(const void *address, Dl_info *info)
    void *dlopen(const char *name, int flags)
    int dlclose(void *library)
    int RTLD_LAZY, RTLD_NOLOAD

cdef str EXPECTED = "int (void *ctx, uint64_t offset, void *dst, size_t length)"
cdef str WHY = ("Python needs the GIL, which the thread that waits for the page may hold: both would wait "
                "for ever. Compile the function: C by ctypes or cffi, numba.cfunc, or Cython")

# The integers of a signature, by all the names that they have in C, ctypes, cffi, numba and Cython.
cdef dict KINDS = dict.fromkeys(("int", "signed int", "int32_t", "int32"), "int")
KINDS |= dict.fromkeys(("uint64_t", "uint64"), "u8")
KINDS |= dict.fromkeys(("unsigned long long", "unsigned PY_LONG_LONG", "ulonglong"), "u8")
KINDS |= dict.fromkeys(("unsigned long", "ulong"), f"u{sizeof(unsigned long)}")
KINDS |= dict.fromkeys(("size_t", "uintptr_t"), f"u{sizeof(size_t)}")
cdef list EXPECTED_KINDS = ["int", "pointer", "u8", "pointer", KINDS["size_t"]]

cdef tuple POINTERS = (ctypes._Pointer, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_wchar_p)
cdef enum:
    FUNCFLAG_PYTHONAPI = 4  # of a ctypes function that is called with the GIL


cdef class Native(Source):
    """What a C function fills: `int fill(void *ctx, uint64_t offset, void *dst, size_t length)`.

    It writes the bytes [offset, offset + length) of the source to dst and returns 0; -errno makes the pages
    fail closed, and anything above 0 too. offset is whole pages; so is length, except at the end of nbytes.
    It is called without the GIL, by several threads at once if the service has them. It must not take the
    GIL, wait for a thread that may hold it, raise or print (numba), or touch memory that is served.

    Args:
        fn: the function: a ctypes function of a CDLL, a cffi function pointer, a `scipy.LowLevelCallable`
            (its user_data is the ctx when none is given), a numba `@cfunc`, a capsule named by its
            signature as in a Cython module's `__pyx_capi__`, or an address.
        ctx: its first argument: None (NULL), an address, a ctypes or cffi pointer, or an object with the
            buffer protocol, such as an array or a ctypes structure: the address of its memory.
        nbytes: how many bytes the source has; None: without end.
        write: a function `int write(void *ctx, uint64_t offset, const void *src, size_t length)` that changes
            are written back with, in whichever form `fn` may have: under the same rules; None: there is none.
        signal_safe: both functions may run in a signal handler (signal-safety(7)): no malloc, no stdio, no
            lock that a thread may hold while it touches the memory. Mode "inline" needs that.

    fn, the library that it is in, and ctx live as long as the source. Raises SourceError for a Python
    function in any disguise that shows, for another signature, for NULL or an address without code, for a
    negative nbytes, and for a ctx that is registered with a userfaultfd; TypeError for anything else.
    """

    cdef object owner
    cdef void *library
    cdef void *writing_library

    def __init__(self, fn, ctx=None, nbytes=None, *, write=None, bint signal_safe=False):
        if self.c.fill != NULL:
            raise SourceError("a Native takes its function once")
        function, context = checked(fn)
        pointer, memory = pointed_at(ctx)
        size = UINT64_MAX if nbytes is None else index(nbytes)
        if not 0 <= size <= UINT64_MAX:
            raise SourceError(f"a source cannot have {size} bytes")
        self.set(<fill_t><uintptr_t>function, <void *><uintptr_t>(context if ctx is None else pointer), size,
                 (fn, ctx, memory, write))
        self.library = library_of(function)
        if write is not None:
            function, _ = checked(write)
            self.c.write = <write_t><uintptr_t>function
            self.writing_library = library_of(function)
        self.c.signal_safe = signal_safe

    def __dealloc__(self):
        if self.library != NULL:
            dlclose(self.library)
        if self.writing_library != NULL:
            dlclose(self.writing_library)

    cdef int set(self, fill_t fill, void *ctx, uint64_t nbytes, owner) except -1:
        if fill == NULL:
            raise SourceError("the function is NULL")
        self.owner = owner
        self.c.size = nbytes
        self.c.ctx = ctx
        self.c.fill = fill
        return 0


cdef Source native(fill_t fill, void *ctx, uint64_t nbytes, object owner):
    cdef Native source = Native.__new__(Native)
    source.set(fill, ctx, nbytes, owner)
    return source


cdef tuple checked(fn):
    """The address of a C function that has our signature, and the ctx that comes with it."""
    function, signature, context = look_up(fn)
    if signature is not None and kinds(signature) != EXPECTED_KINDS:
        raise SourceError(f"the function is {signature!r}; a page source's is {EXPECTED!r}")
    if function and not any("x" in vma.permissions for vma in vmas(function, function + 1)):
        raise SourceError(f"no code at {function:#x}: its library may be unloaded, as cffi does when "
                          "nothing holds what ffi.dlopen returned")
    return function, context


cdef tuple look_up(fn):
    """The address of a C function, its signature (None: it tells none), and the ctx that comes with it."""
    cdef const char *name
    if isinstance(fn, (int, np.integer)):
        return address(fn), None, 0
    if isinstance(fn, ctypes._CFuncPtr):
        return of_ctypes(fn)
    if is_cffi(fn):
        if " calling " in repr(fn):
            raise SourceError(f"{fn!r} is a Python function: {WHY}")
        type_name = sys.modules["_cffi_backend"].typeof(fn).cname
        return cffi_address(fn), type_name.replace("(*)", " "), 0
    if type(fn).__name__ == "CFunc" and made_by(fn, "numba"):
        signature = fn._sig
        return fn.address, f"{signature.return_type} ({', '.join(map(str, signature.args))})", 0
    if type(fn).__name__ == "LowLevelCallable" and made_by(fn, "scipy"):
        look_up(fn.function)  # for what it refuses
        fn = tuple.__getitem__(fn, 0)
    if PyCapsule_CheckExact(fn):
        name = PyCapsule_GetName(fn)
        if name == NULL:
            raise SourceError(f"the capsule has no name, which must be {EXPECTED!r}")
        return (<uintptr_t>PyCapsule_GetPointer(fn, name), name.decode(errors="replace"),
                <uintptr_t>PyCapsule_GetContext(fn))
    if made_by(getattr(fn, "__self__", None), "_cffi_backend"):
        raise SourceError(f"{fn!r} is cffi's Python wrapper of a function: pass ffi.addressof(lib, "
                          f"{fn.__name__!r})")
    if callable(fn):
        raise SourceError(f"{fn!r} is a Python function: {WHY}")
    raise TypeError(f"need a C function, not {type(fn).__name__}: C by ctypes or cffi, numba.cfunc, "
                    "scipy.LowLevelCallable, a capsule of Cython's, or an address")


cdef tuple of_ctypes(fn):
    cdef list arguments = ["void *", "uint64_t", "void *", "size_t"]
    if fn._flags_ & FUNCFLAG_PYTHONAPI:
        raise SourceError(f"{fn!r} is of a ctypes.PyDLL, whose functions need the GIL: use ctypes.CDLL")
    # A callback holds its thunk, and so does what it is cast to.
    if any(type(held).__name__ == "CThunkObject" for held in (fn._objects or {}).values()):
        raise SourceError(f"{fn!r} is a ctypes callback of a Python function: {WHY}")
    if fn.argtypes is not None:
        arguments = [ctypes_name(kind) for kind in fn.argtypes]
    return (ctypes.cast(fn, ctypes.c_void_p).value or 0,
            f"{ctypes_name(fn.restype)} ({', '.join(arguments)})", 0)


cdef str ctypes_name(kind):
    if kind is None:
        return "void"
    if isinstance(kind, type) and issubclass(kind, POINTERS):
        return "void *"
    return getattr(kind, "__name__", "?").removeprefix("c_")


cdef list kinds(str signature):
    """What the types in a C signature are, the result's first."""
    result, _, arguments = signature.partition("(")
    names = [name.strip() for name in (result, *arguments.rstrip(" )").split(","))]
    return ["pointer" if name.endswith("*") or name == "voidptr" else KINDS.get(name) for name in names]


cdef void *library_of(uintptr_t function) noexcept:
    """A handle that keeps the function's library loaded, which a cffi pointer does not; or NULL."""
    cdef Dl_info info
    if not dladdr(<const void *>function, &info):
        return NULL
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)


cdef tuple pointed_at(ctx):
    """The address that a ctx stands for, and what holds the memory there."""
    if ctx is None:
        return 0, None
    if isinstance(ctx, (int, np.integer)):
        return address(ctx), None
    if isinstance(ctx, POINTERS):
        return ctypes.cast(ctx, ctypes.c_void_p).value or 0, None
    if is_cffi(ctx):
        return cffi_address(ctx), None
    try:
        memory = Buffer(ctx)
    except TypeError:
        raise TypeError(f"ctx is an address, a ctypes or cffi pointer, or memory with the buffer protocol, "
                        f"not {type(ctx).__name__}") from None
    return <uintptr_t>(<Source>memory).c.direct, memory


cdef address(number):
    if not 0 <= number <= UINT64_MAX:
        raise SourceError(f"{number} is no address")
    return int(number)


cdef bint made_by(thing, str package):
    return type(thing).__module__.partition(".")[0] == package


cdef bint is_cffi(thing):
    return made_by(thing, "_cffi_backend") and isinstance(thing, sys.modules["_cffi_backend"].FFI.CData)


cdef cffi_address(pointer):
    return int(sys.modules["_cffi_backend"].FFI().cast("uintptr_t", pointer))
