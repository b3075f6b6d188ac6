"""Every plan that does not fit is refused before anything is allocated, by an error that says why."""

import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from meshes import MESHES, cases, fits

import llama_fn as lf
from llama_fn.mesh.plan import PRESETS, default_plan, plan_of

CONFIG = lf.Config(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=40, hidden_dim=28, max_seq_len=64)
TWO, FOUR = {"tp": 2}, {"dp": 2, "tp": 2}


@pytest.mark.parametrize(("mesh", "plan", "words"), [
    (TWO, "tensors", "plan 'tensors' is not known; there are replicated, fsdp, tensor, replicated+tensor, "
                     "fsdp+tensor"),
    (TWO, None, "plan None is not known"),
    (TWO, ("k", "tp"), "plan ('k', 'tp') is not known"),
    (TWO, "fsdp", "plan: *b is divided over 'dp', and the mesh has tp"),
    (TWO, {"k": "dp"}, "plan: k is divided over 'dp', and the mesh has tp"),
    (TWO, {"q": "tp"}, "plan: there is no axis 'q'; the axes are k, g, h, d, f, v, and *b for the rows"),
    (TWO, {"b": "tp"}, "plan: there is no axis 'b'"),
    (TWO, {"k": None}, "plan: k is divided over the name of a mesh axis, got None"),
    (TWO, {"*b": 2}, "plan: *b is divided over the name of a mesh axis, got 2"),
    (TWO, {"*b": ("tp", 1)}, "plan: *b is divided over the name of a mesh axis, got ('tp', 1)"),
    (FOUR, {"f": ("dp", "tp")}, "plan: f can be divided over one mesh axis, got ('dp', 'tp'); only *b may"),
    (TWO, {"*b": ("tp", "tp")}, "plan: *b is divided over one mesh axis twice, ('tp', 'tp')"),
    (TWO, {"k": "tp", "h": "tp"}, "plan: blocks.0.attention.wq has the axes k and h, and 'tp' can divide one of them"),
    (TWO, {"v": "tp", "d": "tp"}, "plan: embedding has the axes v and d, and 'tp' can divide one of them"),
    (TWO, {"g": "tp"}, "wq has 3 numbers along g, and 2 devices (tp) cannot divide them evenly"),
    ({"tp": 3}, {"k": "tp"}, "wq has 2 numbers along k, and 3 devices (tp) cannot divide them evenly; choose a size of "
                             "tp that divides 2"),
    ({"tp": 3}, {"f": "tp"}, "w_gate has 28 numbers along f"),
    ({"tp": 3}, {"v": "tp"}, "embedding has 40 numbers along v"),
    ({"tp": 5}, {"d": "tp"}, "embedding has 24 numbers along d"),
    ({"tp": 0}, {}, "mesh: tp"),
    ({"tp": 2.5}, {}, "mesh: tp"),
    ({"tp": True}, {}, "mesh: tp"),
])
def test_a_plan_that_does_not_fit_is_refused(mesh, plan, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        lf.mesh.check_plan(CONFIG, mesh, plan)


def test_a_mesh_that_does_not_fit_the_world_is_refused():
    for world in (3, 5):
        with pytest.raises(ValueError, match=f"a mesh of dp=2,tp=2 has 4 devices, and {world} processes run"):
            lf.mesh.check_plan(CONFIG, FOUR, "fsdp+tensor", world)
    lf.mesh.check_plan(CONFIG, FOUR, "fsdp+tensor", 4)


@pytest.mark.parametrize("plan", [{}, {"*b": ()}, {"f": "tp"}, {"*b": ("tp", "dp"), "d": "tp", "f": "dp"}])
def test_a_plan_need_not_divide_everything_nor_use_every_axis(plan):
    lf.mesh.check_plan(CONFIG, FOUR, plan, 4)


@pytest.mark.parametrize(("text", "words"), [
    ("", "''"), ("dp", "'dp' should be"), ("dp=", "'dp=' should be"), ("dp=0", "should be"), ("dp=-2", "should be"),
    ("dp=2.0", "should be"), ("=2", "should be"), ("dp=2,", "'' should be"), ("dp=2,dp=2", "'dp' comes twice"),
    ("d p=2", "should be"), ("dp=2 tp=2", "should be"), ("dp=two", "should be"), ("dp=²", "should be"),
])
def test_words_that_are_no_mesh_are_refused(text, words):
    with pytest.raises(ValueError, match="mesh") as error:
        lf.mesh.parse_mesh(text)
    assert words in str(error.value)


@given(st.dictionaries(st.sampled_from(["dp", "tp", "x", "rows_2", "é"]), st.integers(1, 99), min_size=1))
def test_a_mesh_is_read_from_its_words(mesh):
    words = ",".join(f"{name}={size}" for name, size in mesh.items())
    assert lf.mesh.parse_mesh(words) == mesh == lf.mesh.parse_mesh(words.replace(",", ", "))


def test_the_default_plan_is_that_of_the_meshs_axes():
    assert [default_plan(mesh) for mesh in MESHES] == ["fsdp", "tensor", "fsdp", "tensor", *2 * ["fsdp+tensor"]]
    assert default_plan({"tp": 2, "dp": 2}) == "fsdp+tensor"
    with pytest.raises(ValueError, match="no preset has a mesh of the axes pp"):
        default_plan({"pp": 2})
    assert plan_of("fsdp") == PRESETS["fsdp"]


@given(cases(), st.sampled_from([3, 4, 5, 6]))
def test_a_plan_is_accepted_exactly_if_it_divides_every_leaf_evenly(case, size):
    """The definition, axis by axis: no leaf has an axis that its devices do not divide."""
    lf.mesh.check_plan(case.config, case.mesh, case.plan, math.prod(case.mesh.values()))
    mesh = dict.fromkeys(case.mesh, size)
    assume(fits(case.plan, mesh))
    config, plan = case.config, case.plan
    sizes = {"k": config.n_kv_heads, "g": config.group_size, "h": config.head_dim, "d": config.dim,
             "f": config.hidden_dim, "v": config.vocab_size}
    if all(n % size == 0 for axis, n in sizes.items() if axis in plan):
        lf.mesh.check_plan(config, mesh, plan)
    else:
        with pytest.raises(ValueError, match="cannot divide them evenly"):
            lf.mesh.check_plan(config, mesh, plan)
