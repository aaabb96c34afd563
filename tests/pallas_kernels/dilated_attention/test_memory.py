"""CUDA's memory checker over one small forward and backward pass of every GPU kernel."""

import shutil
import subprocess
import sys

import pytest

from pallas_kernels import chain

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from pallas_kernels import chain
from pallas_kernels.dilated_attention import groups

name, height, rel = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "rel"
grid = groups.fit((height, 32), (32, 32), (2, 2))
key = jax.random.key(0)
qkv = (jax.random.normal(key, (1, height, 32, 3, 2, 64), jnp.bfloat16),)
terms = tuple(jax.random.normal(key, (1, height, 32, 2, m)) for m in grid.group) if rel else ()
options = {"grid": grid, "offsets": "all", "scale": 0.125}
if reason := chain.CHAIN[name].unsupported(qkv, terms, **options):
    print(reason)
    sys.exit(77)
(out, lse), pull = jax.vjp(lambda *x: chain.CHAIN[name].run(*x, **options), qkv, terms)
jax.block_until_ready(pull((out, lse)))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("case", [("32", "plain"), ("27", "rel")], ids=["plain", "ragged_rel"])
@pytest.mark.parametrize("name", [n for n in chain.CHAIN if n not in ("xla", "reference")])
def test_kernels_stay_within_their_memory(name, case):
    checker = shutil.which("compute-sanitizer")
    if not checker:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    command = [checker, "--error-exitcode", "99", sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run([*command, name, *case], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
