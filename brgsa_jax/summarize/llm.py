"""Language models that read reports: an OpenAI-compatible server, or a model on this machine.

Report text is data. It reaches a model between delimiters that it cannot contain, and whatever
comes back is no finding until `validate.parse_findings` took it. It leaves this machine only for
a host that the user named. httpx, tenacity and anyio (extra `summarize`) and torch (extra
`convert`) are imported where they are used.
"""

from __future__ import annotations

import email.utils
import hashlib
import importlib.util
import ipaddress
import itertools
import json
import math
import os
import queue
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.summarize import vocabulary
from brgsa_jax.summarize.validate import InvalidAnswer, parse_findings

PROMPT = "findings-1"
# Of one report; the longest of CT-RATE has about 5 000.
MAX_CHARACTERS = 40_000
# Of one HTTP answer; a list of all names has about 3 000.
MAX_BYTES = 2**20
# Seconds; a server that asks for more is out of quota rather than busy.
MAX_PAUSE = 600.0
# With all of 5xx.
TRY_AGAIN = frozenset({408, 409, 425, 429})
RERUN = "finished reports are kept, run the same command again to go on"

Message = dict[str, str]
Chat = list[Message]
Answer = tuple[str, ...] | InvalidAnswer


class Prompt:
    """A version of the prompt, filled with the names a model may answer with.

    Attributes:
        version: name of the file and 8 digits of the SHA-256 of its text and the names; part of
            every cache key, so that a changed prompt is asked anew.
        names: what a model may answer with.
    """

    def __init__(self, file: str = PROMPT, names: Sequence[str] = vocabulary.VOCABULARY) -> None:
        text = (Path(__file__).parent / "prompts" / f"{file}.txt").read_text(encoding="utf-8")
        parts = re.split(r"^=== (\w+) ===\n", text, flags=re.M)[1:]
        section = dict(zip(parts[::2], parts[1::2], strict=True))
        self.names = tuple(names)
        self._system = section["system"].strip().replace("{names}", "\n".join(names))
        self._user = section["user"].strip()
        self._repair = section["repair"].strip()
        content = "\n".join([text, *names])
        self.version = f"{file}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def chat(self, report: str) -> Chat:
        """Returns the messages that ask for the findings of a report.

        Raises:
            InvalidAnswer: the report has no word, or more than `MAX_CHARACTERS`.
        """
        if not re.search(r"\w", report):
            raise InvalidAnswer("the report has no word")
        if len(report) > MAX_CHARACTERS:
            raise InvalidAnswer(f"the report has {len(report)} characters, more than "
                                f"{MAX_CHARACTERS}")
        return [{"role": "system", "content": self._system},
                {"role": "user", "content": self._user.replace("{report}", defuse(report))}]

    def repair(self, chat: Chat, answer: str, reason: str) -> Chat:
        """Returns the messages that tell a model what was wrong with its answer to a chat."""
        return [*chat, {"role": "assistant", "content": defuse(answer[:2000])},
                {"role": "user", "content": self._repair.replace("{reason}", defuse(reason))}]


def defuse(text: str) -> str:
    """Returns a text that can end no delimiter and start no control token of a chat format.

    Compatibility forms become the plain ones (a full-width < is a <), what cannot be seen is left
    out, and the characters that tags and control tokens are made of become entities.
    """
    lines = "\n".join(unicodedata.normalize("NFKC", text).splitlines())
    plain = "".join(c for c in lines if c in "\n\t" or unicodedata.category(c)[0] != "C")
    return plain.translate(_ENTITIES)


_ENTITIES = {ord(c): entity for c, entity in (
    ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("[", "&#91;"), ("]", "&#93;"))}


def read_answer(text: str) -> tuple[str, ...]:
    """Reads a model's text; the thoughts some models write before the answer are passed over.

    Raises:
        InvalidAnswer: see `validate.parse_findings`.
    """
    return parse_findings(text.rpartition("</think>")[2])


def schema(names: Sequence[str]) -> dict[str, Any]:
    """Returns the JSON schema of an answer."""
    return {"type": "object", "required": ["findings"], "additionalProperties": False,
            "properties": {"findings": {"type": "array",
                                        "items": {"type": "string", "enum": list(names)}}}}


class Prices(NamedTuple):
    """What a million tokens cost, in any currency."""

    prompt: float
    completion: float


@dataclass
class Account:
    """What a backend has asked for.

    Attributes:
        requests: sent to the server, further tries included.
        repeated: tries after a request that brought no answer.
        repairs: second requests after an answer that was not valid.
        prompt_tokens: as the server counted them.
        completion_tokens: as the server counted them.
        unmetered: answers without a count of tokens.
        cut: answers that ended at the limit of tokens.
        prices: of the tokens.
        notes: what the user should know of the server, a sentence each.
    """

    requests: int = 0
    repeated: int = 0
    repairs: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    cut: int = 0
    prices: Prices | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def cost(self) -> float | None:
        """What the counted tokens cost; None without prices."""
        if self.prices is None:
            return None
        return (self.prompt_tokens * self.prices.prompt
                + self.completion_tokens * self.prices.completion) / 1e6

    def add(self, usage: object) -> None:
        """Adds the field `usage` of an answer; anything but counts is unmetered."""
        counts = [usage.get(name) if isinstance(usage, dict) else None
                  for name in ("prompt_tokens", "completion_tokens")]
        if all(type(count) is int and 0 <= count < 1e9 for count in counts):
            self.prompt_tokens += counts[0]
            self.completion_tokens += counts[1]
        else:
            self.unmetered += 1

    def __str__(self) -> str:
        text = (f"{self.requests} requests ({self.repeated} repeated, {self.repairs} repairs), "
                f"{self.prompt_tokens} tokens in, {self.completion_tokens} out")
        if self.cost is not None:
            text += f", cost {self.cost:.4f}"
        if self.unmetered:
            text += f"; {self.unmetered} answers without a count of tokens"
        if self.cut:
            text += f"; {self.cut} answers were cut off at the limit of tokens, which can be raised"
        return "\n".join([text, *self.notes])


class _NoAnswerError(Exception):
    """A try without an answer, which another try may bring.

    Attributes:
        reason: for the list of failures.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class OpenAIBackend:
    """Reports read by a server that speaks OpenAI's chat completions (vLLM, Ollama, llama.cpp …).

    Attributes:
        name: kind, model, seed and version of the prompt. Answers are kept by the name of the
            model, not by the address of its server.
        account: requests, tokens and cost, over all calls.
    """

    def __init__(self, model: str, *, endpoint: str = "http://127.0.0.1:8000/v1",
                 send_reports_to: str | None = None, key_variable: str | None = None,
                 concurrency: int = 8, requests_per_minute: float | None = None,
                 timeout: float = 120.0, retries: int = 6, max_tokens: int = 512, seed: int = 0,
                 prices: Prices | None = None, back_off: float = 1.0) -> None:
        """Checks the address and the key; nothing is sent.

        Args:
            model: as the server calls it.
            endpoint: base address, ending in /v1 for most servers.
            send_reports_to: host that reports may be sent to, when the endpoint is not this
                machine; "http://HOST" when they may travel unencrypted.
            key_variable: environment variable with the key; by default OPENAI_API_KEY if set.
            concurrency: requests at a time.
            requests_per_minute: upper limit, spread evenly; None is no limit.
            timeout: seconds for one request, from connecting to the last byte.
            retries: further tries of a request that brought no answer.
            max_tokens: of one answer.
            seed: for servers that draw tokens even at temperature 0.
            prices: for the cost in the account.
            back_off: seconds before the first retry, twice as long before each further one.

        Raises:
            UserError: the address, the permission to send reports there, the key, a number or a
                package is missing or wrong.
        """
        _need("httpx", "tenacity", "anyio", extra="summarize")
        wrong = [name for name, value, least in (
            ("concurrency", concurrency, 1), ("retries", retries, 0), ("max_tokens", max_tokens, 1),
            ("timeout", timeout, 1e-3),
            ("requests_per_minute", 1 if requests_per_minute is None else requests_per_minute,
             1e-3)) if not least <= value < math.inf]
        if wrong:
            raise UserError(f"{', '.join(wrong)} of the openai backend must be a positive number")
        self._url, self._proxies = _address(endpoint, send_reports_to)
        self._key = _key(key_variable)
        self._key_variable = key_variable or "OPENAI_API_KEY"
        self._prompt = Prompt()
        self._model = model
        self._concurrency, self._retries, self._timeout = concurrency, retries, timeout
        self._back_off = back_off
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._free_at = 0.0
        self._reached = self._answered = False
        self._failures_in_a_row = 0
        self._settings: dict[str, Any] = {
            "model": model, "temperature": 0, "seed": seed, "max_tokens": max_tokens,
            "response_format": {"type": "json_schema", "json_schema": {
                "name": "findings", "strict": True, "schema": schema(self._prompt.names)}}}
        self._refused: set[str] = set()
        self.name = f"openai {model} seed {seed} prompt {self._prompt.version}"
        self.account = Account(prices=prices)

    def summarize(self, reports: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Yields (position, findings or why there are none) of every report once, as they finish.

        Closing the generator, or an exception where it is used, ends all requests at once.

        Raises:
            UserError: the server refuses the key, the model or the request, redirects, or has
                stopped answering. What was yielded until then stands.
        """
        from anyio.from_thread import start_blocking_portal

        finished: queue.SimpleQueue[tuple[int, Answer] | None] = queue.SimpleQueue()
        # Requests go on in a thread of their own while the caller stores an answer.
        with start_blocking_portal() as portal:
            work = portal.start_task_soon(self._work, reports, finished.put)
            work.add_done_callback(lambda _: finished.put(None))
            while (item := finished.get()) is not None:
                yield item
            work.result()

    async def _work(self, reports: Sequence[str],
                    finish: Callable[[tuple[int, Answer]], None]) -> None:
        import anyio
        import httpx

        todo = enumerate(reports)

        async def worker() -> None:
            for position, report in todo:
                finish((position, await self._read(client, report)))

        try:
            # The time limit is that of the whole exchange, which httpx does not have.
            client = httpx.AsyncClient(
                timeout=None, follow_redirects=False, trust_env=self._proxies,
                limits=httpx.Limits(max_connections=self._concurrency))
        except (ImportError, ValueError) as error:
            raise UserError(f"the proxy of the environment cannot be used ({_first_line(error)}); "
                            "set HTTPS_PROXY to one with http://") from None
        async with client:
            try:
                async with anyio.create_task_group() as group:
                    for _ in range(min(self._concurrency, len(reports))):
                        group.start_soon(worker)
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _read(self, client: Any, report: str) -> Answer:
        """The findings of one report, after at most one repair."""
        try:
            chat = self._prompt.chat(report)
            answer = await self._ask(client, chat)
            try:
                return read_answer(answer)
            except InvalidAnswer as error:
                chat = self._prompt.repair(chat, answer, error.reason)
            self.account.repairs += 1
            return read_answer(await self._ask(client, chat))
        except InvalidAnswer as error:
            # A new one: the traceback of the other holds the report and the client.
            return InvalidAnswer(error.reason)

    async def _ask(self, client: Any, chat: Chat) -> str:
        """The text of the model's answer, after as many tries as are allowed."""
        import tenacity

        def count(_: Any) -> None:
            self.account.repeated += 1

        # What the server asks to wait, `_turn` waits on top.
        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_NoAnswerError), reraise=True,
            stop=tenacity.stop_after_attempt(self._retries + 1), before_sleep=count,
            wait=tenacity.wait_exponential_jitter(multiplier=self._back_off,
                                                  jitter=self._back_off, max=60))
        try:
            return await tries(self._try, client, chat)
        except _NoAnswerError as error:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= max(self._concurrency, 3):
                raise UserError(f"{self._url} no longer answers ({error.reason}); check the "
                                f"server: {RERUN}") from None
            raise InvalidAnswer(f"no answer after {self._retries + 1} tries: {error.reason}"
                                ) from None

    async def _try(self, client: Any, chat: Chat) -> str:
        """One request, or two or more where the server refuses a setting that can be left out.

        Raises:
            _NoAnswerError: another try may do.
            InvalidAnswer: no further try of this report will do.
            UserError: no try of any report will do.
        """
        while True:
            settings = self._settings
            status, headers, body = await self._exchange(client, {**settings, "messages": chat})
            if status == 200:
                return self._content(body)
            code, message = _error(body)
            # Some llama.cpp servers answer 500 to a setting they do not know.
            if status in (400, 422, 500) and not _too_long(code, message):
                # Another request may have changed the settings meanwhile.
                if self._settings is not settings or self._leave_out(code, message):
                    continue
            self._refuse(status, headers, code, message, chat)

    async def _exchange(self, client: Any, request: Mapping[str, Any]
                        ) -> tuple[int, Mapping[str, str], bytes]:
        """Sends a request in its turn; returns status, headers and body."""
        import anyio
        import httpx

        await self._turn()
        self.account.requests += 1
        # Compressed answers could grow beyond any bound when they are unpacked.
        headers = {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.value}"
        try:
            with anyio.fail_after(self._timeout):
                async with client.stream("POST", self._url, json=request,
                                         headers=headers) as response:
                    self._reached = True
                    body = bytearray()
                    async for chunk in response.aiter_raw():
                        body += chunk
                        if len(body) > MAX_BYTES:
                            raise InvalidAnswer(f"the answer has more than {MAX_BYTES} bytes")
        except TimeoutError:
            raise _NoAnswerError(f"no answer within {self._timeout:g} s") from None
        # Names that are none, and sockets that cannot be had, pass httpx by.
        except (httpx.ConnectError, UnicodeError, OSError) as error:
            if not self._reached:
                raise UserError(f"nothing answers at {self._url} ({_one_line(error)}); start the "
                                "server or mend the endpoint") from None
            raise _NoAnswerError("no connection could be made") from None
        except httpx.TransportError as error:
            raise _NoAnswerError(f"the connection broke ({type(error).__name__})") from None
        if self._key and len(self._key.value) >= 8:
            # Some servers repeat a wrong key in their message; "none" and the like are no secrets.
            body = body.replace(self._key.value.encode(), b"***")
        return response.status_code, response.headers, bytes(body)

    async def _turn(self) -> None:
        """Waits until the rate limit, or a pause the server asked for, lets a request go."""
        import anyio

        while (wait := self._free_at - time.monotonic()) > 0:
            await anyio.sleep(wait)
        self._free_at = time.monotonic() + self._interval

    def _content(self, body: bytes) -> str:
        """The model's text in a chat completion."""
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _NoAnswerError("the server sent no chat completion") from None
        self.account.add(answer.get("usage"))
        self._answered, self._failures_in_a_row = True, 0
        if choice.get("finish_reason") == "length":
            self.account.cut += 1
        if not isinstance(content, str):
            raise InvalidAnswer("the model gave no text")
        return content

    def _leave_out(self, code: str, message: str) -> bool:
        """Changes the first setting that a refusal names, each once; False if it names none."""
        limit = self._settings.get("max_tokens")
        for part, instead, note in (
                ("response_format", {"response_format": {"type": "json_object"}},
                 "takes no JSON schema: plain JSON is asked for instead, and checked all the same"),
                ("max_tokens", {"max_completion_tokens": limit},
                 "calls max_tokens max_completion_tokens"),
                ("seed", {}, "takes no seed: its answers may differ from run to run"),
                ("temperature", {},
                 "takes no temperature 0: its answers may differ from run to run")):
            if part in self._refused or not re.search(rf"\b{part}\b", f"{code} {message}"):
                continue
            self._refused.add(part)
            kept = {key: value for key, value in self._settings.items() if key != part}
            self._settings = kept | instead
            self.account.notes.append(f"the server {note}")
            return True
        return False

    def _refuse(self, status: int, headers: Mapping[str, str], code: str, message: str,
                chat: Chat) -> None:
        """Raises what an answer other than 200 means; see `_try`."""
        where = f"{self._url} answers {status}"
        said = _quotable(message, chat)
        if status == 413 or status in (400, 422, 500) and _too_long(code, message):
            raise InvalidAnswer("the report is longer than the model can read")
        if (status in TRY_AGAIN or status >= 500) and "insufficient_quota" not in code:
            pause = _retry_after(headers.get("retry-after"))
            if pause is not None:
                if pause > MAX_PAUSE:
                    raise UserError(f"{where} and asks to wait {pause:.0f} s; {RERUN} then")
                # The limit is that of the key, so every request waits.
                self._free_at = max(self._free_at, time.monotonic() + pause)
            raise _NoAnswerError(f"the server answers {status}")
        if status in (400, 422):
            if "content_filter" in code or "content_policy" in code:
                raise InvalidAnswer("the server's content filter refuses the report")
            # Where others were answered, the fault lies with this report.
            if self._answered:
                raise InvalidAnswer(f"the server refuses the request{said}")
            raise UserError(f"{where}{said}; check the model and the settings")
        if status in (401, 403):
            mend = (f"check the key in {self._key_variable}" if self._key else
                    f"put a key into the environment variable {self._key_variable}")
            raise UserError(f"{where}: the key is missing or not accepted; {mend}")
        if status == 404:
            raise UserError(f"{where}{said}: there is no model {self._model!r} or no such address; "
                            "check --model, and that the endpoint ends as the server's manual "
                            "says, mostly in /v1")
        if 300 <= status < 400:
            raise UserError(f"{where}, a redirection, which is not followed because reports go "
                            "only to the host you named; give the final address as endpoint")
        if status in (402, 429):
            raise UserError(f"{where}: the account has no quota left{said}; {RERUN}")
        raise UserError(f"{where}{said}; check the endpoint")


class _Key(NamedTuple):
    """A secret that shows in no message."""

    value: str

    def __repr__(self) -> str:
        return "***"


def _key(variable: str | None) -> _Key | None:
    name = variable or "OPENAI_API_KEY"
    key = os.environ.get(name, "").strip()
    if not key and variable:
        raise UserError(f"the environment variable {name} holds no key; set it, or leave "
                        "--key-variable out")
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"the key in the environment variable {name} holds spaces or other "
                        "characters no key has; set it again")
    return _Key(key) if key else None


def _address(endpoint: str, send_reports_to: str | None) -> tuple[str, bool]:
    """Checks where reports would go.

    Returns:
        The address of chat completions, and whether the environment's proxies may be used: only
        where they see no report.

    Raises:
        UserError: no plain address, or another machine that was not named.
    """
    import httpx

    mend = "give one such as http://127.0.0.1:8000/v1"
    try:
        url = httpx.URL(endpoint)
    except (httpx.InvalidURL, TypeError):
        raise UserError(f"the endpoint is no address; {mend}") from None
    if url.scheme not in ("http", "https") or not url.host or not \
            0 < (80 if url.port is None else url.port) < 2**16:
        raise UserError(f"the endpoint is no http or https address; {mend}")
    if url.userinfo or url.query or url.fragment:
        raise UserError(f"the endpoint at {url.host} holds a user, a password, or something after "
                        "? or #, where no key belongs; give the plain address, and keys by "
                        "environment variable")
    host = url.host
    if not _is_loopback(host):
        consent = (send_reports_to or "").lower()
        if consent.removeprefix("http://") != host:
            named = f", not {send_reports_to}" if send_reports_to else ""
            raise UserError(f"the endpoint would send reports to {host}{named}; if patients' "
                            f"reports may go there, add --send-reports-to {host}")
        if url.scheme == "http" and consent == host:
            raise UserError(f"reports would travel to {host} unencrypted; use https, or a tunnel "
                            f"to this machine, or add --send-reports-to http://{host}")
    path = url.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return (str(url.copy_with(path=path, query=None)),
            url.scheme == "https" and not _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _error(body: bytes) -> tuple[str, str]:
    """Code with parameter, and message, of an answer that reports an error; empty if none."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if not isinstance(error, dict):
        return "", str(error)
    code = " ".join(str(error[key]) for key in ("code", "type", "param") if error.get(key))
    return code, str(error.get("message") or error.get("detail") or "")


def _too_long(code: str, message: str) -> bool:
    return "context_length" in code or re.search(
        r"context (length|size|window)|too many tokens|prompt is too long|at least 1, got -",
        message, re.I
        ) is not None


def _quotable(message: str, chat: Chat) -> str:
    """The start of a server's message, unless it repeats what was sent."""
    line = _one_line(message)[:160]
    sent = " ".join(_one_line(entry["content"]) for entry in chat[1:])
    run = 16
    if not line or any(line[i:i + run] in sent for i in range(len(line) - run + 1)):
        return ""
    return f" ({line})"


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, given as such or as a date; None if it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(value)
            seconds = (then - datetime.now(then.tzinfo or UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _need(*packages: str, extra: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this backend needs {' and '.join(missing)}; install them with pip "
                        f"install 'brgsa-jax[{extra}]'")


class TransformersBackend:
    """Reports read by a causal language model on this machine, in batches.

    Attributes:
        name: kind, model and version of the prompt. Of a folder the name holds a digest of the
            files' names, sizes and times.
        account: repairs; tokens cost nothing here.
    """

    def __init__(self, model: str, *, batch_size: int = 8, max_tokens: int = 256,
                 device: str | None = None,
                 generate: Callable[[list[Chat]], list[str | InvalidAnswer]] | None = None) -> None:
        """Names the model; it is loaded when the first report comes.

        Args:
            model: Hugging Face folder or hub id, with weights as safetensors.
            batch_size: reports at a time; halved whenever memory does not suffice.
            max_tokens: of one answer.
            device: "cpu", "cuda", "cuda:1" …; None takes a GPU if there is one.
            generate: chats to answers; None is a `LocalModel` of `model`.

        Raises:
            UserError: torch is missing, or a number is too small.
        """
        if batch_size < 1 or max_tokens < 1:
            raise UserError("batch size and limit of tokens of the transformers backend must be "
                            "at least 1")
        if generate is None:
            _need("torch", extra="convert")
        self._model, self._device, self._max_tokens = model, device, max_tokens
        self._batch_size, self._generate = batch_size, generate
        self._prompt = Prompt()
        self.name = f"transformers {_identity(model)} prompt {self._prompt.version}"
        self.account = Account()

    def summarize(self, reports: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Yields (position, findings or why there are none) of every report once.

        Reports of similar length share a batch, so that little is padded; the longest come first,
        so that memory fails at once or not at all.

        Raises:
            UserError: the model cannot be loaded.
        """
        chats: dict[int, Chat] = {}
        for position, report in enumerate(reports):
            try:
                chats[position] = self._prompt.chat(report)
            except InvalidAnswer as error:
                yield position, InvalidAnswer(error.reason)
        if chats and self._generate is None:
            self._generate = LocalModel.load(self._model, max_tokens=self._max_tokens,
                                             device=self._device)
        waiting = sorted(chats, key=lambda position: -len(reports[position]))
        while waiting:
            batch, waiting = waiting[:self._batch_size], waiting[self._batch_size:]
            yield from self._read({position: chats.pop(position) for position in batch})

    def _read(self, chats: dict[int, Chat]) -> Iterator[tuple[int, Answer]]:
        """The findings of one batch, after at most one repair each."""
        repairs: dict[int, Chat] = {}
        for position, answer in self._answers(chats):
            found = _checked(answer)
            if isinstance(found, InvalidAnswer) and isinstance(answer, str):
                repairs[position] = self._prompt.repair(chats[position], answer, found.reason)
            else:
                yield position, found
        self.account.repairs += len(repairs)
        for position, answer in self._answers(repairs):
            yield position, _checked(answer)

    def _answers(self, chats: Mapping[int, Chat]) -> Iterator[tuple[int, str | InvalidAnswer]]:
        waiting = list(chats)
        while waiting:
            batch = waiting[:self._batch_size]
            answers = self._attempt([chats[position] for position in batch])
            if answers is None and len(batch) > 1:
                self._batch_size = len(batch) // 2
                continue
            if answers is None:
                answers = [InvalidAnswer("there is not enough memory for this report")]
            yield from zip(batch, answers, strict=True)
            waiting = waiting[len(batch):]

    def _attempt(self, chats: list[Chat]) -> list[str | InvalidAnswer] | None:
        """Answers, or None where memory does not suffice; the caller tries again outside."""
        self.account.requests += len(chats)
        try:
            return self._generate(chats)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(
                    "out of memory|can't allocate|not enough memory", str(error), re.I):
                raise UserError(f"the model {self._model} failed ({_first_line(error)}); try "
                                "another device or model") from error
            return None


def _checked(answer: str | InvalidAnswer) -> Answer:
    if isinstance(answer, InvalidAnswer):
        return answer
    try:
        return read_answer(answer)
    except InvalidAnswer as error:
        return InvalidAnswer(error.reason)


def _identity(model: str) -> str:
    """A hub id as it is; a folder's last name and a digest of what lies in it."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns)
                   for path in folder.iterdir() if path.is_file())
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    return f"{folder.resolve().name}-{digest}"


class LocalModel:
    """A tokenizer and a causal language model: chats to the texts they are continued with."""

    def __init__(self, tokenizer: Any, model: Any, *, max_tokens: int, tensors: str = "pt") -> None:
        """Takes what `load` makes.

        Args:
            tokenizer: of Hugging Face.
            model: has `generate`, `config`, `generation_config` and `device`.
            max_tokens: of one answer.
            tensors: kind of arrays the model takes, as tokenizers call it.

        Raises:
            UserError: the tokenizer has no token to pad or end with.
        """
        from transformers import GenerationConfig

        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end of text "
                                "and no padding; give a model made for generation")
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer, self._model, self._tensors = tokenizer, model, tensors
        self._room = getattr(model.config, "max_position_embeddings", None) or math.inf
        self._max_tokens = max_tokens
        ends = getattr(model.generation_config, "eos_token_id", None)
        # Of one's own: that of the folder may draw, search beams or punish repetition.
        self._greedy = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends)

    @classmethod
    def load(cls, folder_or_hub_id: str, *, max_tokens: int, device: str | None = None
             ) -> LocalModel:
        """Loads safetensors and tokenizer; runs no code of the model's folder.

        Raises:
            UserError: there is no such model, or the device is not there.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import is_torch_cuda_available

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder_or_hub_id, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder_or_hub_id, trust_remote_code=False, use_safetensors=True, dtype="auto")
            model = model.to(device or ("cuda" if is_torch_cuda_available() else "cpu")).eval()
        # What a stranger's folder makes these libraries raise has no common kind.
        except Exception as error:
            raise UserError(f"no language model can be loaded from {folder_or_hub_id!r} "
                            f"({_first_line(error)}); give a Hugging Face folder or hub id of a "
                            "causal language model with safetensors") from error
        return cls(tokenizer, model, max_tokens=max_tokens)

    def __call__(self, chats: list[Chat]) -> list[str | InvalidAnswer]:
        """Returns the answer to every chat, always the most likely token next.

        A chat that leaves no room for an answer is refused, never cut.
        """
        texts = [self._text(chat) for chat in chats]
        # A template writes the start of the text itself.
        special = self._tokenizer.chat_template is None
        lengths = [len(ids) for ids in
                   self._tokenizer(texts, add_special_tokens=special)["input_ids"]]
        fits = [length + self._max_tokens <= self._room for length in lengths]
        answers = iter(self._continue([*itertools.compress(texts, fits)], special))
        return [next(answers) if fit else
                InvalidAnswer("the report is longer than the model can read") for fit in fits]

    def _continue(self, texts: list[str], special: bool) -> list[str]:
        if not texts:
            return []
        # Padded on the left, for the answer follows on the right.
        inputs = self._tokenizer(texts, add_special_tokens=special, padding=True,
                                 padding_side="left", return_tensors=self._tensors)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self._tensors == "pt":
            ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        out = self._model.generate(input_ids=ids, attention_mask=mask,
                                   generation_config=self._greedy)
        return self._tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)

    def _text(self, chat: Chat) -> str:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            return "\n\n".join([*(entry["content"] for entry in chat), "Answer: "])

        def fill(messages: Chat) -> str:
            # Models that can think first are asked not to; other templates pass over it.
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)

        try:
            return fill(chat)
        except TemplateError:
            # Some models know no system message.
            system, user, *rest = chat
            both = f"{system['content']}\n\n{user['content']}"
            return fill([{"role": "user", "content": both}, *rest])
