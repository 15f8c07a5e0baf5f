"""A compressed array behind a URL, of which only what is looked at is fetched.

    python examples/http_zarr.py              # 128 MiB, compressed into a temporary folder
    python examples/http_zarr.py slice.png    # and plots the slice

The folder is served by a process of its own, as it would be by another machine: whoever touches a page may
hold this process's GIL until the page has come.
"""

import functools
import http.server
import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy as np

try:
    import aiohttp  # noqa: F401
    import zarr
except ModuleNotFoundError as error:
    sys.exit(f"this example needs {error.name}: pip install 'userfault[zarr]' aiohttp")

from userfault.stores import open_zarr


class Handler(http.server.SimpleHTTPRequestHandler):
    fetched = None  # bytes of the bodies that were sent

    def copyfile(self, source, outputfile):  # type: ignore[no-untyped-def]
        body = source.read()
        with self.fetched.get_lock():
            self.fetched.value += len(body)
        outputfile.write(body)

    def log_message(self, *_):  # type: ignore[no-untyped-def]
        pass


def serve(folder, fetched, port):  # type: ignore[no-untyped-def]
    Handler.fetched = fetched
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        port.send(server.server_address[1])
        server.serve_forever()


def main(folder: str, picture: str | None) -> None:
    y, x = np.mgrid[0:4096, 0:4096] / 512
    z = zarr.create_array(f"{folder}/waves.zarr", shape=y.shape, chunks=(256, 256), dtype="f8")
    z[:] = np.round(np.sin(x * y) + np.cos(3 * x), 3)
    stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    context = multiprocessing.get_context("spawn")
    fetched, (ours, theirs) = context.Value("q", 0), context.Pipe()
    server = context.Process(target=serve, args=(folder, fetched, theirs))
    server.start()
    try:
        with open_zarr(f"http://127.0.0.1:{ours.recv()}/waves.zarr") as a:
            part = np.array(a[1000:1200, 3000:3300])
            assert np.array_equal(part, z[1000:1200, 3000:3300])
    finally:
        server.terminate()
        server.join()
    print(f"{a.nbytes:,} bytes in the array, {part.nbytes:,} in the slice")
    print(f"{fetched.value:,} bytes fetched of {stored:,} stored")
    if picture:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        pyplot.imshow(part, extent=(3000, 3300, 1200, 1000))
        pyplot.colorbar()
        pyplot.savefig(picture)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary, sys.argv[1] if len(sys.argv) > 1 else None)
