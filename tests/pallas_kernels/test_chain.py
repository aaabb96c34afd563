import types

import jax.numpy as jnp
import pytest

from pallas_kernels import Unsupported, chain, dilated_attention

X = jnp.ones((8, 2, 4))


def backend(name, reason, ran):
    return types.SimpleNamespace(
        NAME=name,
        unsupported=lambda *args, **kwargs: reason,
        run=lambda *args, **kwargs: ran.append((name, args, kwargs)) or name,
    )


@pytest.fixture
def ran(monkeypatch):
    """Replaces the chain by two that refuse around two that do not; lists what ran."""
    ran = []
    reasons = {"picky": "needs a GPU.", "first": None, "second": None, "old": "JAX has dropped it."}
    monkeypatch.setattr(chain, "CHAIN", {n: backend(n, r, ran) for n, r in reasons.items()})
    return ran


def test_first_that_does_not_refuse_runs(ran):
    assert chain.run(None, 1, scale=2) == "first"
    assert ran == [("first", (1,), {"scale": 2})]


def test_named_one_runs_although_another_is_preferred(ran):
    assert chain.run("second") == "second"
    assert [name for name, *_ in ran] == ["second"]


def test_named_one_that_refuses_raises_and_nothing_runs(ran):
    with pytest.raises(Unsupported, match=r"(?s)this call:.*picky: needs a GPU\."):
        chain.run("picky")
    assert not ran


def test_refusals_of_all_are_listed(ran, monkeypatch):
    refusing = {n: chain.CHAIN[n] for n in ("picky", "old")}
    monkeypatch.setattr(chain, "CHAIN", refusing)
    with pytest.raises(Unsupported, match=r"(?s)picky: needs a GPU\..*old: JAX has dropped it\."):
        chain.run(None)
    assert not ran


def test_explain_asks_all_in_order_and_runs_nothing(ran):
    found = chain.explain(1, scale=2)
    assert list(found.items()) == [
        *(("picky", "needs a GPU."), ("first", None), ("second", None)),
        ("old", "JAX has dropped it."),
    ]
    assert not ran


def test_error_in_a_back_end_is_not_caught(ran, monkeypatch):
    def run(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(chain.CHAIN["first"], "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        chain.run(None)
    assert not ran


def test_unknown_name_lists_the_known():
    known = ", ".join(map(repr, chain.CHAIN))
    with pytest.raises(ValueError, match=f"implementation='xlaa' is unknown; pass one of {known}"):
        dilated_attention(X, X, X, segment=4, implementation="xlaa")


def test_reference_is_there_by_name():
    named = dilated_attention(X, X, X, segment=4, implementation="reference")
    assert jnp.array_equal(named, dilated_attention(X, X, X, segment=4))
