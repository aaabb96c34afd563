"""The house keeps its rules: imports flow one way, files stay small, modules have their tests."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # each package, and what of ours and of the heavy libraries it may import
    "pallas_kernels": {"pallas_kernels", "jax", "numpy", "jax_triton", "triton"},
    "samlight_jax": {
        *("samlight_jax", "pallas_kernels", "jax", "numpy", "flax", "jaxtyping"),
        *("PIL", "rich", "tyro", "safetensors", "orbax", "gradio"),
    },
    "train": {
        *("train", "samlight_jax", "pallas_kernels", "jax", "numpy", "flax", "jaxtyping", "PIL"),
        *("grain", "optax", "orbax", "rich", "tyro", "pycocotools", "cv2", "matplotlib"),
        *("tensorflow_datasets", "tensorboardX", "array_record", "ml_dtypes"),
    },
    "convert": {
        *(
            "convert",
            "samlight_jax",
            "numpy",
            "onnx",
            "onnxruntime",
            "torch",
            "safetensors",
            "tyro",
        ),
    },
}
STANDARD = __import__("sys").stdlib_module_names


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path):
    """The top-level names of everything a file imports, and the full dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_flow_one_way(package):
    for path in sources(package):
        tops = {name.split(".")[0] for name in imports(path)} - STANDARD
        assert tops <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {tops}"


def test_triton_is_imported_by_its_back_end_alone():
    importers = {
        path.stem
        for path in sources("pallas_kernels")
        if {"triton", "jax_triton"} & {name.split(".")[0] for name in imports(path)}
    }
    assert importers == {"jax_triton", "jax_triton_kernels"}


def test_few_modules_know_the_kernels():
    importers = {
        path.name
        for path in sources("samlight_jax")
        if any(name.startswith("pallas_kernels") for name in imports(path))
    }
    assert importers == {
        *("attention.py", "layers.py", "mask_decoder.py", "transformer.py"),
        "automatic_mask_generator_device.py",
    }


@pytest.mark.parametrize("package", [*MAY_IMPORT, "benchmarks", "demo", "tests"])
def test_no_file_is_too_long(package):
    for path in sources(package):
        lines = len(path.read_text().splitlines())
        limit = 600 if path.stem.endswith("_kernels") else 400
        assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines"


def test_the_released_weights_are_not_ignored():
    """Wheel and sdist leave out what git ignores."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no clone")
    for name, code in (("samlight_jax/weights/samlight_t", 1), ("samlight_t", 0)):
        command = ["git", "check-ignore", "--no-index", "-q", f"{name}.safetensors"]
        assert subprocess.run(command, cwd=ROOT).returncode == code


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_function_is_too_long(package):
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                if ast.get_docstring(node) is not None:
                    del node.body[0]
                lines = node.end_lineno - node.body[0].lineno + 1 if node.body else 0
                assert lines <= 50, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def itself_or_whole(path):
    """The module, and the one beside it that it is a part of: triton_kernels is of triton."""
    words = path.stem.split("_")
    stems = ["_".join(words[:i]) for i in range(1, len(words))]
    return [path.stem, *(stem for stem in stems if path.with_stem(stem).exists())]


def test_every_module_has_its_test_file():
    exempt = {"__init__", "__main__", "errors"}  # errors: through every command's tests
    for package in MAY_IMPORT:
        for path in sources(package):
            test = ROOT / "tests" / path.relative_to(ROOT).with_name(f"test_{path.name}")
            tests = [test.with_stem(f"test_{stem}") for stem in itself_or_whole(path)]
            tested = path.stem in exempt or any(test.exists() for test in tests)
            assert tested, f"{test.relative_to(ROOT)} is missing"
