"""What every test shares: hypothesis's profiles, and a small tokenizer and model made once a session."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import engine

import llama_fn as lf
from llama_fn.ops import room

# A process started in the background of a script ignores Ctrl-C, and its children with it; ours are asked to stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # and one under nohup ignores the end of its terminal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # a GPU's kernels run on the CPU; triton looks when it is imported
    os.environ["TORCH_WARM_POOL"] = "0"  # or torch.compile starts processes for Triton, each of which imports torch
os.environ["HF_HUB_OFFLINE"] = "1"  # or transformers asks the network for what a folder does not have

# No deadline and no complaint about slow draws: a test machine may be busy, and time is no law.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
FIRST = (Phase.explicit, Phase.generate)  # the first example that fails is reported, and no smaller one looked for
settings.register_profile("quick", derandomize=True, max_examples=4, phases=FIRST, **PATIENT)  # pytest -m "not slow"
settings.register_profile("ci", derandomize=True, max_examples=15, **PATIENT)
settings.register_profile("unshrunk", derandomize=True, max_examples=15, phases=FIRST, **PATIENT)  # plant.py
settings.register_profile("deep", max_examples=300, **PATIENT)  # pytest --hypothesis-profile deep
engine.MAX_SHRINKING_SECONDS = 30  # five minutes as hypothesis has it


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("--hypothesis-profile", None)
    settings.load_profile(chosen or ("quick" if config.option.markexpr == "not slow" else "ci"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Python looks for no garbage among what is imported, neither meanwhile (a third of the time) nor ever after."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with slow tests come first, and many short tests last, so that both processes end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# A failing example shows its config, not its weights (inductor formats numbers, and wants a threshold of 4 at least).
torch.set_printoptions(threshold=4, edgeitems=1)
room.PAGE = 2  # or no cache in the tests would be read in part
torch.set_num_threads(1)  # tensors of a few hundred numbers: a second thread costs more than it gives
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too: they find what is compiled


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Warnings are errors in the tests, but for those that the package itself keeps unsaid."""
    lf.quiet.ignore()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """200 stories."""
    return [story.text for story in lf.stories.stories(lf.random.key(0), 200)]


@pytest.fixture(scope="session")
def tokenizer(texts) -> lf.Tokenizer:
    """Trained on the stories: 3 special tokens, 256 bytes, 52 characters, and merges."""
    return lf.train_tokenizer(texts, 401)


@pytest.fixture(scope="session")
def model(tokenizer) -> lf.Model:
    """Random weights; k = 2, g = 3, h = 8, d = 48, f = 70, v = 401, 4 layers: no two axes of one size."""
    config = lf.Config(dim=48, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=tokenizer.vocab_size, hidden_dim=70,
                       max_seq_len=96)
    return lf.Model(lf.init_params(lf.random.key(1), config), tokenizer)
