"""The command line teaches: what is wrong, with the value, and what to do."""

import os
import pty
import select
import socket
import subprocess

import expect
from server import clean_environment


def _run(binary: str, *arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    environment = clean_environment() | (env or {})
    return subprocess.run([binary, *arguments], input=stdin, capture_output=True, text=True, timeout=30, env=environment)


def _refused(binary: str, *arguments: str, says: list[str], env: dict[str, str] | None = None) -> None:
    done = _run(binary, *arguments, env=env)
    expect.that(done.returncode not in (0, 101), f"`quire {' '.join(arguments)}` ended with {done.returncode}")
    for part in says:
        expect.contains(done.stderr.lower(), part.lower(), f"what `quire {' '.join(arguments)}` says")
    expect.that("panicked" not in done.stderr, done.stderr)
    expect.equal(done.stdout, "", "errors go to standard error")


def a_number_that_is_none_is_named(binary: str) -> None:
    _refused(binary, "serve", "--max-seqs", "banana", says=["banana", "--max-seqs"])
    _refused(binary, "serve", "--max-seqs", "-4", says=["-4"])
    _refused(binary, "serve", "--max-seqs", "0", says=["max", "seqs", "0"])
    _refused(binary, "serve", "--max-waiting", "0", says=["max", "waiting", "0"])
    _refused(binary, "serve", "--threads", "0", says=["0", "--threads"])


def an_environment_variable_that_is_wrong_is_named(binary: str) -> None:
    _refused(binary, "serve", says=["banana", "max-seqs", "variable QUIRE_MAX_SEQS"], env={"QUIRE_MAX_SEQS": "banana"})
    _refused(binary, "serve", says=["maybe", "variable QUIRE_DETERMINISTIC"], env={"QUIRE_DETERMINISTIC": "maybe"})
    done = _run(binary, "serve", "--max-seqs", "banana", env={"QUIRE_MAX_SEQS": "4"})
    expect.that("variable" not in done.stderr, done.stderr)


def an_empty_environment_variable_sets_nothing(binary: str) -> None:
    names = ("QUIRE_MODEL", "QUIRE_THREADS", "QUIRE_DEVICE", "QUIRE_DETERMINISTIC", "QUIRE_KV_CACHE_MEMORY")
    for command in (["run", "--max-tokens", "4", "What is `Vec`?"], ["show"]):
        done = _run(binary, *command, env=dict.fromkeys(names, ""))
        expect.equal(done.returncode, 0, done.stderr)
        expect.that(done.stdout, "no output")


def an_empty_name_is_refused(binary: str) -> None:
    _refused(binary, "serve", "--served-model-name", "", says=["--served-model-name"])


def a_model_that_is_not_there_is_named(binary: str) -> None:
    _refused(binary, "serve", "--model", "/nonexistent", says=["/nonexistent"])
    _refused(binary, "serve", "/nonexistent", says=["/nonexistent"])
    _refused(binary, "run", "--model", "/nonexistent", "hello", says=["/nonexistent"])
    _refused(binary, "show", "--model", "/nonexistent", says=["/nonexistent"])
    _refused(binary, "show", "no-owner/no-model", says=["no-owner/no-model", "hf download no-owner/no-model --local-dir no-model"])


def a_model_is_no_prompt(binary: str) -> None:
    for path in ("/nonexistent/model.gguf", "/"):
        _refused(binary, "run", path, says=[f"quire run --model {path}"])


def a_model_is_named_once(binary: str) -> None:
    for command in ("serve", "show"):
        _refused(binary, command, "/nonexistent", "--model", "/elsewhere", says=["twice", "--model"])
        _refused(binary, command, "/nonexistent", says=["/nonexistent"], env={"QUIRE_MODEL": "/elsewhere"})


def a_cache_that_is_too_small_says_what_would_do(binary: str) -> None:
    _refused(binary, "serve", "--kv-cache-memory", "10", says=["kv", "cache", "10"])
    _refused(binary, "serve", "--kv-cache-memory", "much", says=["much", "--kv-cache-memory", "512MiB"])


def an_address_is_checked(binary: str) -> None:
    _refused(binary, "serve", "--http", "nonsense", says=["nonsense", "--http"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags in (
            ["--http", f"127.0.0.1:{port}", "--grpc", "127.0.0.1:0"],
            ["--http", "127.0.0.1:0", "--grpc", f"127.0.0.1:{port}"],
        ):
            # Before the model: one that is not there is not looked for.
            _refused(binary, "serve", *flags, "--model", "/nonexistent", says=[port, "in use"])


def a_misspelt_command_or_flag_is_corrected(binary: str) -> None:
    _refused(binary, "serv", says=["serv", "serve"])
    _refused(binary, "serve", "--max-seq", "4", says=["--max-seqs"])


def help_names_commands_flags_and_environment_variables(binary: str) -> None:
    top = _run(binary, "--help")
    expect.equal(top.returncode, 0)
    for command in ("serve", "run", "demo"):
        expect.contains(top.stdout, command)
    serve = _run(binary, "serve", "--help")
    expect.equal(serve.returncode, 0)
    for part in ("--http", "--grpc", "--max-seqs", "QUIRE_MAX_SEQS", "QUIRE_HTTP", "QUIRE_GRPC", "QUIRE_KV_CACHE_MEMORY"):
        expect.contains(serve.stdout, part, "quire serve --help")


def version_is_told(binary: str) -> None:
    done = _run(binary, "--version")
    expect.that(done.stdout.startswith("quire ") and done.stdout.count(".") == 2, done.stdout)


def a_reader_who_leaves_is_no_error(binary: str) -> None:
    for arguments in (["demo", "--clients", "2", "--max-tokens", "4"], ["run", "--max-tokens", "40", "What is `Vec`?"], ["show"]):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing) as closed:
            done = _printing_to(closed, binary, arguments)
        expect.equal(done.returncode, 0, f"`quire {' '.join(arguments)}` into a closed pipe: {done.stderr}")
        expect.that("error" not in done.stderr and "panicked" not in done.stderr, done.stderr)
        with open("/dev/full", "w") as full:
            done = _printing_to(full, binary, arguments)
        expect.equal(done.returncode, 1, f"`quire {' '.join(arguments)}` onto a full disk")
        expect.contains(done.stderr, "standard output")
        expect.that("panicked" not in done.stderr, done.stderr)


def _printing_to(output, binary: str, arguments: list[str]) -> subprocess.CompletedProcess:
    command = [binary, *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True, timeout=30, env=clean_environment())


def a_prompt_on_the_command_line_is_answered(binary: str) -> None:
    done = _run(binary, "run", "What does `Vec::push` do?")
    expect.equal(done.returncode, 0, done.stderr[-500:])
    expect.that(done.stdout.strip(), "no answer")
    expect.that("<|" not in done.stdout, f"control tokens in {done.stdout!r}")


def an_answer_that_is_cut_says_by_what(binary: str) -> None:
    done = _run(binary, "run", "--max-tokens", "4", "--temperature", "0", "What does `Vec::push` do?")
    expect.equal(done.returncode, 0, done.stderr)
    expect.contains(done.stderr, "4 tokens: --max-tokens")


def a_chat_says_what_it_understands(binary: str) -> None:
    with _Chat(binary) as chat:
        chat.answers("/help", "/clear")
        chat.answers("/clera", "no command /clera")
        chat.answers("\x03", "/exit ends")
        chat.answers("What is `Vec`?", "--max-tokens")
        chat.answers("/clear", "Forgotten")
        chat.write("/exit\r")
        expect.equal(chat.process.wait(10), 0, "exit code")


def a_chat_that_fills_the_context_says_how_to_go_on(binary: str) -> None:
    with _Chat(binary, "--max-model-len", "64") as chat:
        chat.answers("Tell me what " + "a vector and " * 40 + "a list is", "/clear")


class _Chat:
    """`quire run` on a terminal of its own."""

    def __init__(self, binary: str, *flags: str):
        self.ours, theirs = pty.openpty()
        environment = clean_environment() | {"TERM": "xterm"}
        command = [binary, "run", "--max-tokens", "4", *flags]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
        os.close(theirs)

    def __enter__(self) -> "_Chat":
        self.read_until(">>> ")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def write(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def read_until(self, end: str, text: str = "") -> str:
        while end not in text:
            ready, _, _ = select.select([self.ours], [], [], 20)
            expect.that(ready, f"nothing more after {text!r}")
            text += os.read(self.ours, 4096).decode(errors="replace")
        return text

    def answers(self, line: str, part: str) -> None:
        """What comes of a line, or of a key, has this part, and then the prompt comes again."""
        self.write(line if line == "\x03" else line + "\r")
        # The terminal shows what is typed, too.
        said = self.read_until(part) if part not in line else self.read_until(part, self.read_until("\n"))
        self.read_until(">>> ", said[said.rindex(part):])


def text_through_a_pipe_goes_after_the_prompt(binary: str) -> None:
    def answer(*prompt: str, stdin: str) -> str:
        done = _run(binary, "run", "--temperature", "0", "--max-tokens", "24", *prompt, stdin=stdin)
        expect.equal(done.returncode, 0, done.stderr[-500:])
        expect.that(done.stdout.strip(), "no answer")
        return done.stdout

    together = answer("What does this do?", stdin="`Vec::push`\n")
    expect.equal(together, answer(stdin="What does this do?\n\n`Vec::push`"), "prompt and pipe, and all of it through the pipe")
    expect.that(together != answer("What does this do?", stdin=""), "the pipe is ignored")


def an_input_that_never_ends_is_not_waited_for(binary: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [binary, "run", "--max-tokens", "4", "What is `Vec`?"]
        done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=30, env=clean_environment())
    expect.equal(done.returncode, 0, done.stderr[-500:])
    expect.that(done.stdout.strip(), "no answer beside a socket")


def a_prompt_without_words_is_refused(binary: str) -> None:
    _refused(binary, "run", says=["the prompt is empty"])
    _refused(binary, "run", "", says=["the prompt is empty"])
    _refused(binary, "run", " \n", says=["the prompt is empty"])
