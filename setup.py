"""Builds fastfuse._C and fastfuse/lib/_CUDA.so with CMake and Ninja; everything else about the
build is in CMakeLists.txt.

Environment: FASTFUSE_SKIP_NATIVE=1 installs the Python alone (reference backend only);
FASTFUSE_SANITIZE=address,undefined builds with sanitizers (see `make test-sanitize`);
FASTFUSE_ISAS="portable;avx2" builds for these instruction sets alone, =native for those that this
processor has, FASTFUSE_EMULATE_AVX512=1 AVX-512's for a processor without it (see
`make test-avx512`). fastfuse/lib/_CUDA.so is built where nvcc is found: FASTFUSE_CUDA=OFF leaves it
out, ON insists; FASTFUSE_CUDA_ARCHS="90a" builds for these compute capabilities alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "lib/_CUDA.so"  # no module: it knows neither Python nor torch


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
            from torch.utils.cpp_extension import include_paths
        except ImportError as error:
            raise SystemExit(
                "fastfuse builds against the torch you run: install torch first, then use "
                f"`pip install --no-build-isolation` ({error})"
            ) from error
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        tag = f"py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
        sanitize = os.environ.get("FASTFUSE_SANITIZE", "")
        isas = os.environ.get("FASTFUSE_ISAS", "")
        emulated = os.environ.get("FASTFUSE_EMULATE_AVX512") == "1"
        kinds = [*(["sanitize"] if sanitize else []), *(["emulated"] if emulated else [])]
        parts = [tag, *kinds, *filter(None, isas.split(";"))]
        build = ROOT / "build" / "-".join(parts)
        (target.parent / CUDA_LIBRARY).unlink(missing_ok=True)  # linked anew, if there is nvcc
        configure = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTFUSE_TORCH_INCLUDE": ";".join(include_paths()),
            "FASTFUSE_TORCH_LIB": Path(torch.__file__).parent / "lib",
            "FASTFUSE_TORCH_VERSION": torch.__version__,
            "FASTFUSE_SANITIZE": sanitize,
            "FASTFUSE_ISAS": isas,
            "FASTFUSE_EMULATE_AVX512": "ON" if emulated else "OFF",
            "FASTFUSE_CUDA": os.environ.get("FASTFUSE_CUDA", "auto"),
            "FASTFUSE_VERSION": self.distribution.get_version(),
        }
        archs = os.environ.get("FASTFUSE_CUDA_ARCHS")
        if archs:
            configure["FASTFUSE_CUDA_ARCHS"] = archs
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # of a tree that was moved or copied, which CMake refuses
        # CMake would keep what an earlier build was told, such as one capability alone.
        forgotten = ["-UFASTFUSE_CUDA_ARCHS", "-UFASTFUSE_NVCC"]
        definitions = forgotten + [f"-D{name}={value}" for name, value in configure.items()]
        # cmake and ninja may be installed beside this Python without being on the path.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *definitions],
            ["cmake", "--build", str(build)],
        ):
            executable = shutil.which(command[0], path=path) or command[0]
            subprocess.run([executable, *command[1:]], env=environment, check=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built, source = Path(self.build_lib, "fastfuse", CUDA_LIBRARY), ROOT / "fastfuse"
        (source / CUDA_LIBRARY).unlink(missing_ok=True)
        if built.exists():
            (source / CUDA_LIBRARY).parent.mkdir(exist_ok=True)
            shutil.copy(built, source / CUDA_LIBRARY)


class BuildPython(build_py):
    """Puts the benchmark suite into wheels, for `python -m fastfuse bench`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "fastfuse" / "_benchmarks"
            target.mkdir(parents=True, exist_ok=True)
            for source in (ROOT / "benchmarks").glob("*.py"):
                shutil.copy(source, target)


skip_native = os.environ.get("FASTFUSE_SKIP_NATIVE", "") not in ("", "0")
setup(
    ext_modules=[] if skip_native else [Extension("fastfuse._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
