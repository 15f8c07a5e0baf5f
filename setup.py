"""Build the Cython extensions: `pyx/_name.pyx` becomes `userfault._name`.

Everything static lies in pyproject.toml. Cython runs inside build_ext, so that asking this file
for metadata needs no compiler and no Cython.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.modified import newer_group

DECLARATIONS = [str(path) for path in (*Path("python/userfault").glob("*.pxd"), *Path("pyx").glob("*.h"))]
EXTENSIONS = [
    Extension(
        f"userfault.{source.stem}", [source.as_posix()], depends=DECLARATIONS, extra_compile_args=["-O3"]
    )
    for source in sorted(Path("pyx").glob("*.pyx"))
]


class build_ext(_build_ext):
    """build_ext that translates the .pyx files, finding `userfault/*.pxd` under python/."""

    def build_extensions(self) -> None:
        from Cython.Build import cythonize

        translated = cythonize(
            self.extensions,
            include_path=["python"],
            build_dir=str(Path(self.build_temp, "cython")),
            # Cython does not see that pyx/_name.pyx depends on userfault/_name.pxd.
            force=any(newer_group(DECLARATIONS, self.get_ext_fullpath(e.name)) for e in self.extensions),
            compiler_directives={
                "language_level": 3,
                "boundscheck": False,
                "wraparound": False,
                "cdivision": True,
                "initializedcheck": False,
            },
        )
        sources = {extension.name: extension.sources for extension in translated}
        for extension in self.extensions:
            extension.sources = sources[extension.name]
        self.parallel = self.parallel or os.cpu_count()
        super().build_extensions()


setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": build_ext})
