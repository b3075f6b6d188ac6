"""`llama-fn chat`: a conversation line by line, its commands, and what is said of bad lines."""

import io
import json
import sys

import pytest
from dialogs import dialog, own_tokens, save_talker
from program import cli

import llama_fn as lf
from llama_fn.cli import chat as chatting


def piped(text: str | bytes) -> io.TextIOWrapper:
    """Standard input that holds a text, and then ends."""
    return io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode(errors="surrogatepass")))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model with a context of 100 tokens."""
    return save_talker(tokenizer, 100, tmp_path_factory.mktemp("model"))


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path, folder, tokenizer):
    """Type lines; the model answers with the texts given, each of them to its end (None: Ctrl-C in it)."""
    monkeypatch.chdir(tmp_path)

    def program(lines: list[str], answers: list[str | None] = (), *options: str) -> tuple[int, str, str]:
        script = iter([id for text in answers for id in
                       ([None] if text is None else [*own_tokens(tokenizer, text), tokenizer.eos_id])])

        def sample(key, logits, tokens):
            if (id := next(script)) is None:
                raise KeyboardInterrupt
            return logits.argmax() * 0 + id

        monkeypatch.setattr(chatting, "sampler", lambda *_: sample)
        monkeypatch.setattr(sys, "stdin", piped("".join(f"{line}\n" for line in lines)))
        done = cli(monkeypatch, capsys, "chat", str(folder), *options)
        assert list(script) in ([], [tokenizer.eos_id])  # which is not drawn when the context is full
        return done

    return program


def test_answers_go_to_standard_output_one_a_message(talk):
    assert talk(["Who?", "", "  ", "and the boy?"], ["Felix the fox", "Omar"]) == (0, "Felix the fox\nOmar\n", "")


def test_a_pipe_gives_what_the_library_gives(talk, monkeypatch, capsys, folder):
    monkeypatch.setattr(sys, "stdin", piped("Who?\nand?"))
    status, out, err = cli(monkeypatch, capsys, "chat", str(folder), "--seed", "7", "--system", "Be brief.",
                           "--max-new-tokens", "5", "--temperature", "0.9", "--top-k", "99")
    model, chat, said = lf.load(folder), lf.Chat("Be brief."), ""
    for turn, question in enumerate(["Who?", "and?"], 1):
        key = lf.random.fold_in(lf.random.key(7), turn)
        for piece, so_far in lf.answer(model, lf.ask(model, chat, question), key=key, max_new_tokens=5,
                                       sampler=lf.sampler(0.9, 99, 0.9)):
            said, chat = said + piece, so_far
        said += "\n"
    assert (status, out, err) == (0, said, "")


def test_help_names_the_commands_and_what_is_none(talk):
    status, out, err = talk(["/help", "/fly"])
    assert (status, out) == (0, "") and err.endswith("unknown command /fly; /help lists the commands\n")
    for command in ("/system TEXT", "/again", "/drop N", "/reset", "/save FILE", "/quit", "Ctrl-D", "Ctrl-C"):
        assert command in err


def test_quit_leaves(talk):
    assert talk(["/quit", "Who?"]) == talk(["/exit", "Who?"]) == (0, "", "")


def saved(file: str) -> list[lf.Message]:
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)


def test_a_saved_conversation_goes_on(talk):
    status, _, err = talk(["Who? \u00e9", "/save one.json"], ["Felix"], "--system", "Be brief.")
    assert (status, err) == (0, "one.json: 1 exchange\n")
    assert saved("one.json") == dialog("Be brief.", [("Who? \u00e9", "Felix")])
    talk(["and?", "/save two.json", "/save two.json"], ["Omar"], "--dialog", "one.json")
    assert saved("two.json") == dialog("Be brief.", [("Who? \u00e9", "Felix"), ("and?", "Omar")])
    assert "two.json exists; choose another name\n" in talk(["/save two.json", "/save"])[2]
    talk(["/save none.json"])
    assert saved("none.json") == [] and talk([], [], "--dialog", "none.json")[0] == 0
    talk(["/save three.json"], [], "--dialog", "two.json", "--system", "")
    assert saved("three.json") == saved("two.json")[1:]


def test_an_answer_with_a_tag_in_it_is_saved_and_opened_again(talk):
    for i, text in enumerate(["a [/INST] b <<SYS>>", "</s> [INST]", ""]):
        talk(["Who?", f"/save {i}.json"], [text])
        status, _, err = talk(["and?", f"/save {i}{i}.json"], ["Omar"], "--dialog", f"{i}.json")
        assert (status, err) == (0, f"{i}{i}.json: 2 exchanges\n")
        assert [message["content"] for message in saved(f"{i}{i}.json")] == ["Who?", text, "and?", "Omar"]
        assert saved(f"{i}{i}.json")[:2] == saved(f"{i}.json")


def test_commands_change_the_conversation(talk):
    lines = ["one", "two", "/drop 1", "/save drop.json", "/system Be long.", "/again", "/save again.json", "/system",
             "/reset", "three", "/save reset.json"]
    status, out, err = talk(lines, ["1", "2", "other", "3"])
    assert (status, out) == (0, "1\n2\nother\n3\n")
    assert "23 tokens are free again\n" in err and "system message: Be long.\nagain.json" in err
    assert "no system message\na new conversation\n" in err
    assert saved("drop.json") == dialog(None, [("two", "2")])
    assert saved("again.json") == dialog("Be long.", [("two", "other")])
    assert saved("reset.json") == dialog(None, [("three", "3")])


def test_reset_keeps_the_systems_words(talk):
    talk(["one", "/reset", "two", "/save a.json"], ["1", "2"], "--system", "Be brief.")
    assert saved("a.json") == dialog("Be brief.", [("two", "2")])


@pytest.mark.parametrize(("line", "message"), [
    ("so [/INST] sure", "the message contains '[/INST]', a tag of the chat format itself, which is not allowed"),
    ("/system <<SYS>>", "the system's message contains '<<SYS>>', a tag of the chat format itself"),
    ("a\ud800", "the text is not valid Unicode: character 8 is the lone surrogate U+DCED"),
    ("/drop", "/drop N drops the N oldest of 1 exchanges, got ''"),
    ("/drop 2", "/drop N drops the N oldest of 1 exchanges, got '2'"),
    ("/drop " + "9" * 5000, "/drop N drops the N oldest of 1 exchanges, got '999"),
    ("/save /proc/none.json", "/proc/none.json: No such file or directory, while writing; choose another place"),
    ("/drop 0", "/drop N drops the N oldest of 1 exchanges, got '0'"),
    ("/save", "/save needs the name of a file"), ("/save .", ". exists; choose another name"),
    ("/save a.json/b.json", "a.json: no such folder"),
])
def test_a_bad_line_loses_nothing_but_itself(talk, line, message):
    open("a.json", "w").close()
    status, out, err = talk(["one", line, "two", "/save all.json"], ["1", "2"])
    assert (status, out) == (0, "1\n2\n") and err.startswith(message) and err.count("\n") == 2
    assert saved("all.json") == dialog(None, [("one", "1"), ("two", "2")])


def test_a_message_of_many_lines_is_one(talk):
    talk(["one", '"""', "two", "/reset", "", '"""', "/save all.json"], ["1", "2"])
    assert saved("all.json") == dialog(None, [("one", "1"), ("two\n/reset\n", "2")])


def test_nothing_can_be_answered_again_before_it_was_asked(talk):
    assert talk(["/again"]) == (0, "", "there is no question yet\n")


def test_what_does_not_fit_waits_in_its_order_for_the_room(talk):
    one, two, three, four = (digit * 20 for digit in "1234")  # a digit is a token
    lines = [one, two, three, "/help", four, three * 5, "/drop 1", "/drop 9", "/drop 1", "/save a.json"]
    status, out, err = talk(lines, ["1", "2", "3", "4"])
    assert (status, out) == (0, "1\n2\n3\n4\n")
    full, *helped, again, third, free, fourth, much, freed, long, _ = err.splitlines()
    for line in (full, again, third, fourth):
        assert line.startswith("the context of 100 tokens is full: the conversation has ")
        assert line.endswith("; the waiting messages are then sent; /drop 0 discards them")
    assert "; /drop 1 frees 41 tokens; /drop 2 frees 82 tokens; " in full and len(helped) == 7
    assert much == "/drop N drops the N oldest of 2 exchanges, got '9'"
    assert free == freed == "41 tokens are free again" and long.endswith("the message alone is too long: shorten it")
    assert saved("a.json") == dialog(None, [(three, "3"), (four, "4")])


def test_what_waits_can_be_forgotten_and_is_not_lost_in_silence(talk):
    lines = [digit * 20 for digit in "1234"]
    status, out, err = talk([*lines[:3], "/drop 0", "/drop 0", "/save a.json"], ["1", "2"])
    assert err.splitlines()[1:3] == ["the waiting messages are discarded",
                                     "/drop N drops the N oldest of 2 exchanges, got '0'"]
    assert saved("a.json") == dialog(None, [(lines[0], "1"), (lines[1], "2")])
    for end in ([], ["/quit"]):
        assert talk([*lines, *end], ["1", "2"])[2].endswith("\nnot sent, because the context is full: 2 messages\n")
    status, out, err = talk([*lines[:3], "/reset", lines[3]], ["1", "2", "4"])
    assert (status, out) == (0, "1\n2\n4\n") and err.endswith("\na new conversation\n")


def test_an_answer_that_fills_the_context_tells_it(talk):
    status, out, err = talk(["one"], ["1" * 80])
    assert (status, out) == (0, "1" * 80 + "\n")
    assert err == "[the context of 100 tokens is full; /drop 1 frees 100 tokens]\n"


def test_in_a_pipe_ctrl_c_ends_the_program(talk):
    assert talk(["one", "two"], ["1", None]) == (130, "1\n [stopped]\n", "")


@pytest.mark.parametrize(("options", "message"), [
    (["--temperature", "-1"], "sampler: temperature must lie in [0, inf), got -1.0"),
    (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    (["--system", "[INST]"], "the system's message contains '[INST]', a tag of the chat format itself"),
    (["--dialog", "nowhere.json"], "nowhere.json: No such file or directory"),
    (["--dialog", "bad.json"], "bad.json: not a conversation as /save writes it: "),
    (["--dialog", "text.json"], "text.json: not a conversation as /save writes it: message 0 of a dialog needs"),
    (["--dialog", "order.json"], "order.json: not a conversation as /save writes it: a dialog goes (system,) user,"),
    (["--dialog", "deep.json"], "deep.json: not a conversation as /save writes it: "),
    (["--dialog", "latin.json"], "latin.json: not a conversation as /save writes it: not UTF-8: byte 0x"),
])
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, tmp_path, folder, options, message):
    monkeypatch.chdir(tmp_path)
    files = {"bad": b"{}", "text": b'[{"role": "user"}]', "order": b'[{"role": "assistant", "content": "1"}]',
             "deep": b"[" * 100_000, "latin": b"\xe9"}
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_bytes(data)
    status, out, err = cli(monkeypatch, capsys, "chat", str(folder), *options)
    assert (status, out) == (2, "") and err.startswith(f"llama-fn: {message}") and err.count("\n") == 1, err
