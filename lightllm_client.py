# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The lightllm_client authors
"""A client for LightLLM servers that looks and answers like openai's, in one file.

    from lightllm_client import LightLLMClient

    client = LightLLMClient(base_url="http://localhost:8000")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    response = client.chat.completions.create(model="default", messages=messages)
    print(response.choices[0].message.content)

Copy this file into your repository under any name. It needs Python 3.8 or newer and
nothing else (Pillow only to make or resize images). It is synchronous, thread-safe and
fork-safe. Everything above the line "the fold" is for you, below it is the machinery.
`python lightllm_client.py --help` asks a server from the command line.
"""

from __future__ import annotations

import base64
import binascii
import errno
import http.client
import io
import itertools
import json
import os
import random
import re
import select
import socket
import stat
import sys
import time
import urllib.parse
import urllib.request
from operator import itemgetter, methodcaller

TYPE_CHECKING = False  # checkers take this name for true; importing typing takes time
if TYPE_CHECKING:
    import ssl
    from typing import (
        Any,
        Callable,
        Generator,
        Generic,
        Iterable,
        Iterator,
        Literal,
        Mapping,
        NoReturn,
        Sequence,
        TypeVar,
        overload,
    )

    from typing_extensions import Required, Self, TypedDict, Unpack

    _Answer = TypeVar("_Answer")
    _Steps = Generator[None, None, _Answer]
    _Json = dict[str, Any]
    _StrDict = dict[str, str]
else:
    _Answer, _Json, _StrDict = None, dict, dict

    class Generic:
        def __class_getitem__(cls, answer):
            return cls

    class TypedDict:
        def __init_subclass__(cls, total=True):
            pass

    def overload(function):
        return function


__version__ = "1.0.0"

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BaseModel",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionMessage",
    "Completion",
    "ConflictError",
    "ContentFilterFinishReasonError",
    "DEFAULT_MAX_RETRIES",
    "DEFAULT_TIMEOUT",
    "InternalServerError",
    "LengthFinishReasonError",
    "LightLLMClient",
    "NOT_GIVEN",
    "NotFoundError",
    "NotGiven",
    "Omit",
    "OpenAI",
    "OpenAIError",
    "PermissionDeniedError",
    "RateLimitError",
    "Stream",
    "Timeout",
    "UnprocessableEntityError",
    "not_given",
    "omit",
    "run_tool",
]

# --- settings ---
# Limits and defaults, with their units. A limit can be changed in the module before the
# first request (`lightllm_client.MAX_IMAGE_BYTES = 50 << 20`); what differs between
# clients is an argument of the client.

DEFAULT_TIMEOUT = 600.0  # seconds, for one attempt
DEFAULT_MAX_RETRIES = 2  # attempts after the first one
MAX_IMAGE_BYTES = 20 << 20  # of one image file
MAX_REPLY_BYTES = 256 << 20  # of one plain reply
MAX_ERROR_BYTES = 8 << 20  # of an error reply: a 422 sends the request's images back
MAX_EVENT_BYTES = 8 << 20  # of one server-sent event
MAX_IDLE_CONNECTIONS = 100  # kept open by one client between requests, to one origin
IDLE_SECONDS = 8.0  # for which one is kept usable: LightLLM closes it after 10


class NotGiven:
    """The type of NOT_GIVEN: "take the default", where None means "do not send it"."""

    def __bool__(self) -> Literal[False]:
        return False

    def __repr__(self) -> str:
        return "NOT_GIVEN"


class Omit(NotGiven):
    """The type of `omit`: like NOT_GIVEN; as a header's value it removes the header."""


NOT_GIVEN = not_given = NotGiven()
omit = Omit()


class Timeout:
    """Limits in seconds for the phases of one attempt; None waits for ever.

    `connect` is for TCP and TLS, `write` for the sending, `read` for a plain reply once
    the request is sent, or for the wait for a stream's next bytes. `pool` is there for
    openai's sake: nothing waits for a pool.
    """

    def __init__(self, timeout: float | None = None, **phases: float | None) -> None:
        self.connect = phases.pop("connect", timeout)
        self.read = phases.pop("read", timeout)
        self.write = phases.pop("write", timeout)
        self.pool = phases.pop("pool", timeout)
        if phases:
            raise TypeError(f"Timeout takes connect, read, write, pool, not {phases}")

    def __repr__(self) -> str:
        return f"Timeout(connect={self.connect}, read={self.read}, write={self.write})"


# --- errors ---
# openai's names and attributes. A message says what was asked of whom, what came back
# and what to try; the same facts are attributes. Keys are taken out before an error is
# made. All errors survive pickle.


class Headers(_StrDict):
    """Response headers: lower-case names, read in any case; repeats joined by ", "."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class Request:
    """What was asked: `.method` and `.url`."""

    def __init__(self, method: str, url: str) -> None:
        self.method = method
        self.url = url


class Response:
    """One HTTP reply. `with_raw_response` returns it; the content of a stream is b""."""

    def __init__(self, request: Request, status_code: int, headers: Headers) -> None:
        self.request = request
        self.method = request.method
        self.url = request.url
        self.status_code = status_code
        self.headers = headers
        self.content = b""
        self.request_id: str | None = headers.get("x-request-id")
        self.retries_taken = 0
        self.is_closed = True
        self._seconds = 0.0
        self._parsed: Any = None

    def __repr__(self) -> str:
        return f"<Response [{self.status_code}]>"

    @property
    def text(self) -> str:
        return _text(self.content)

    @property
    def elapsed(self) -> Any:
        """A datetime.timedelta from the request to the last byte that was read."""
        import datetime

        return datetime.timedelta(seconds=self._seconds)

    def json(self) -> Any:
        """The decoded content. Raises ValueError where it is not JSON."""
        return _parse_json(self.text)

    def parse(self) -> Any:
        """What the call without `with_raw_response` returns; the same object always."""
        return self._parsed


class OpenAIError(Exception):
    """The base of every error that a request raises."""


class APIError(OpenAIError):
    """A request that failed: `.message`, `.request`, `.body`, `.code`, `.param`, `.type`.

    `body` is the value of "error" in the server's JSON, else the JSON, else the text.
    `partial` is None, or what a stream had brought when it failed: a ChatCompletion with
    the text and the finished calls so far; its finish_reason is None.
    """

    def __init__(self, message: str, request: Any = None, *, body: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.request = request
        self.body = body
        self.partial: Any = None
        facts = body if isinstance(body, dict) else {}
        code = facts.get("code")
        self.code: str | None = None if code is None else str(code)
        self.param: str | None = facts.get("param")
        self.type: str | None = facts.get("type")

    def __reduce__(self) -> tuple[Any, ...]:
        return Exception.__new__, (type(self), *self.args), self.__dict__


class APIConnectionError(APIError):
    """No whole answer: no connection, or it broke. `__cause__` says why."""

    def __init__(self, *, message: str = "Connection error.", request: Any = None):
        super().__init__(message, request)


class APITimeoutError(APIConnectionError):
    """No whole answer within `timeout`."""

    def __init__(self, request: Any = None, *, message: str = "Request timed out."):
        super().__init__(message=message, request=request)


class APIResponseValidationError(APIError, ValueError):
    """A good status with something else than was asked for: HTML, cut JSON, ..."""

    def __init__(self, response: Any, body: Any, *, message: str = "Invalid data."):
        super().__init__(message, response.request, body=body)
        self.response = response
        self.status_code: int = response.status_code


class APIStatusError(APIError):
    """Another status than 2xx: `.status_code`, `.response`, `.request_id`."""

    def __init__(self, message: str, *, response: Any, body: Any = None) -> None:
        super().__init__(message, response.request, body=body)
        self.response = response
        self.status_code: int = response.status_code
        self.request_id: str | None = response.headers.get("x-request-id")


class BadRequestError(APIStatusError):
    """400"""


class AuthenticationError(APIStatusError):
    """401"""


class PermissionDeniedError(APIStatusError):
    """403"""


class NotFoundError(APIStatusError):
    """404"""


class ConflictError(APIStatusError):
    """409"""


class UnprocessableEntityError(APIStatusError):
    """422"""


class RateLimitError(APIStatusError):
    """429"""


class InternalServerError(APIStatusError):
    """500 and above"""


class LengthFinishReasonError(OpenAIError):
    """Never raised: for `except` clauses written for openai."""


class ContentFilterFinishReasonError(OpenAIError):
    """Never raised: for `except` clauses written for openai."""


_STATUS_ERRORS: dict[int, tuple[type[APIStatusError], str]] = {
    400: (BadRequestError, "change what it names"),
    401: (AuthenticationError, "check api_key"),
    403: (PermissionDeniedError, "check api_key"),
    404: (NotFoundError, "check base_url, or this LightLLM build lacks the route"),
    405: (APIStatusError, "check base_url: is that a LightLLM server?"),
    409: (ConflictError, "try again"),
    413: (APIStatusError, "send less: smaller images (max_image_side=), fewer messages"),
    417: (APIStatusError, "this node takes other requests: try base_url=.../generate"),
    422: (UnprocessableEntityError, "this LightLLM build takes another type there"),
    429: (RateLimitError, "the server is busy: wait, or raise max_retries"),
    500: (InternalServerError, "LightLLM of 2025 says so of bad parameters and of too"
          " long prompts as well: see the server's log"),
    503: (InternalServerError, "the server is busy or starting: wait, then try again"),
}  # fmt: skip

# --- answers ---
# openai's names and fields on top of dicts: `response.choices[0].message` and
# `response["choices"][0]["message"]` are the same, and json.dumps takes them. A declared
# field that the server left out reads as None; what only the server knows is kept.
# Values are never checked or converted, only nested objects get their class.


class BaseModel(_Json):
    """A JSON object with its fields as attributes."""

    _fields: tuple[str, ...] = ()
    _nested: tuple[tuple[str, Any], ...] = ()
    _request_id: str | None = None

    def __init_subclass__(cls) -> None:
        """The annotations say which fields there are, and which hold other objects."""
        declared = cls.__dict__.get("__annotations__", {})
        cls._fields = tuple(declared)
        kinds = [re.sub(r"list\[|]| \| None", "", text) for text in declared.values()]
        pairs = [(name, globals().get(kind)) for name, kind in zip(declared, kinds)]
        cls._nested = tuple(pair for pair in pairs if hasattr(pair[1], "_nested"))
        for name in declared:
            setattr(cls, name, property(methodcaller("get", name)))

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.update(self.model_validate(self))

    @classmethod
    def model_validate(cls, data: _Json) -> Self:
        """The object for plain data, nested objects included; nothing is checked."""
        model = cls.__new__(cls)
        model.update(data)
        for name, kind in cls._nested:
            value = data.get(name)
            if value is not None:
                model[name] = _nested_in(value, kind)
        return model

    def __missing__(self, name: str) -> Any:
        if name not in self._fields:
            raise KeyError(name)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name[:1] == "_":
            object.__setattr__(self, name, value)
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(name)
        del self[name]

    def __bool__(self) -> bool:
        return True  # as in openai, where an empty delta is true as well

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *map(str, self)})

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self[name]!r}" for name in self._names())
        return f"{type(self).__name__}({shown})"

    def _names(self) -> list[str]:
        return [*self._fields, *(name for name in self if name not in self._fields)]

    @property
    def model_extra(self) -> _Json:
        """The fields that only the server knows."""
        return {name: self[name] for name in self if name not in self._fields}

    @property
    def model_fields_set(self) -> set[str]:
        return {name for name in self if name in self._fields}

    def model_copy(self, *, update: Any = None, deep: bool = False) -> Self:
        import copy

        twin = copy.deepcopy(self) if deep else copy.copy(self)
        twin.update(update or {})
        return twin

    def model_dump(
        self, *, include: Any = None, exclude: Any = None, **options: Any
    ) -> _Json:
        """Plain dicts and lists; declared fields that the server left out are None.

        `include` and `exclude`: a set of names, or a dict of name -> True or the same
        for what is inside (list items by number or "__all__"). `exclude_none`,
        `exclude_unset`, `exclude_defaults`; pydantic's other keywords change nothing.
        """
        wanted = True if include is None else include
        plain: _Json = _plain(self, wanted, exclude or False, options)
        return plain

    def model_dump_json(self, *, indent: int | None = None, **options: Any) -> str:
        """`model_dump(...)` as JSON text."""
        marks = (",", ":") if indent is None else None
        plain = self.model_dump(**options)
        return json.dumps(plain, ensure_ascii=False, indent=indent, separators=marks)

    def to_dict(self, *, exclude_unset: bool = True, **options: Any) -> _Json:
        """`model_dump` of the fields that the server sent."""
        return self.model_dump(exclude_unset=exclude_unset, **options)

    def to_json(
        self, *, indent: int | None = 2, exclude_unset: bool = True, **options: Any
    ) -> str:
        """`to_dict` as JSON text."""
        options["exclude_unset"] = exclude_unset
        return self.model_dump_json(indent=indent, **options)

    copy = model_copy
    dict = model_dump
    json = model_dump_json

    def _shown(self, options: _Json) -> Iterator[tuple[str, Any]]:
        for name in self._names():
            if self[name] is not None or not (
                options.get("exclude_none")
                or (options.get("exclude_unset") and name not in self)
                or (options.get("exclude_defaults") and name in self._fields)
            ):
                yield name, self[name]


# --- answer objects ---
# One short class an object, with openai's names. The annotations are the declared fields,
# for people, checkers and the base; a class stands before those that hold its objects.


class Function(BaseModel):
    """What a call names; `arguments` is a JSON string."""

    name: str
    arguments: str


class ChatCompletionMessageToolCall(BaseModel):
    id: str
    type: str
    function: Function


class _Reasoning(BaseModel):
    """`reasoning` and `reasoning_content` both read whichever the server sent."""

    reasoning = property(itemgetter("reasoning"))
    reasoning_content = property(itemgetter("reasoning_content"))

    def __getitem__(self, name: str) -> Any:
        if name[:9] == "reasoning" and self.get(name) is None:
            return self.get("reasoning" if name != "reasoning" else "reasoning_content")
        return super().__getitem__(name)


class Details(BaseModel):
    """What openai nests and LightLLM seldom sends: any field reads, as None if unset."""

    @classmethod
    def model_validate(cls, data: _Json) -> Self:
        details = cls.__new__(cls)
        details.update((name, _nested_in(value, cls)) for name, value in data.items())
        return details

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(name)
        return self.get(name)


class ChatCompletionMessage(_Reasoning):
    """`content` is the model's text with the tags of its calls."""

    role: str
    content: str | None
    refusal: str | None
    annotations: list[Details] | None
    audio: Details | None
    function_call: Function | None
    tool_calls: list[ChatCompletionMessageToolCall] | None


class Choice(BaseModel):
    index: int
    message: ChatCompletionMessage
    finish_reason: str
    logprobs: Details | None


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: Details | None
    prompt_tokens_details: Details | None


class ChatCompletion(BaseModel):
    id: str
    choices: list[Choice]
    created: int
    model: str
    object: str
    metadata: _StrDict | None
    moderation: Details | None
    service_tier: str | None
    system_fingerprint: str | None
    usage: CompletionUsage | None


class ChoiceDeltaToolCallFunction(BaseModel):
    name: str | None
    arguments: str | None


class ChoiceDeltaToolCall(BaseModel):
    index: int
    id: str | None
    type: str | None
    function: ChoiceDeltaToolCallFunction | None


class ChoiceDelta(_Reasoning):
    role: str | None
    content: str | None
    refusal: str | None
    audio: Any
    function_call: Function | None
    tool_calls: list[ChoiceDeltaToolCall] | None


class ChunkChoice(BaseModel):
    index: int
    delta: ChoiceDelta
    finish_reason: str | None
    logprobs: Details | None


class ChatCompletionChunk(BaseModel):
    """A piece of an answer; the one that carries the usage has no choices."""

    id: str
    choices: list[ChunkChoice]
    created: int
    model: str
    object: str
    moderation: Details | None
    obfuscation: str | None
    service_tier: str | None
    system_fingerprint: str | None
    usage: CompletionUsage | None


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: str
    logprobs: Details | None


class Completion(BaseModel):
    id: str
    choices: list[CompletionChoice]
    created: int
    model: str
    object: str
    system_fingerprint: str | None
    usage: CompletionUsage | None


class Model(BaseModel):
    """A served model; LightLLM adds `max_model_len`, its context in tokens."""

    id: str
    created: int
    object: str
    owned_by: str
    shutdown_date: int | None


class ModelList:
    """A page of models: iterable, all of them in `.data`."""

    object = "list"

    def __init__(self, data: list[Model]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Model]:
        return iter(self.data)

    def has_next_page(self) -> bool:
        return False


class Health:
    """Whether a server is ready: true or false, with `.reason`."""

    def __init__(self, ready: bool, reason: str) -> None:
        self.ready = ready
        self.reason = reason

    def __bool__(self) -> bool:
        return self.ready

    def __repr__(self) -> str:
        return f"Health({self.ready}, {self.reason!r})"


# --- client ---
# Options and namespaces. Nothing is connected before the first request. Copies made by
# `with_options` share their original's connections; a pickled client takes its options
# along and opens connections of its own.


class LightLLMClient:
    """A client for one LightLLM server, used as openai's.

    `api_key`: str, a callable that returns one (called for each request), None (take
    LIGHTLLM_API_KEY or OPENAI_API_KEY from the environment, if set), "" (none).
    `base_url`: http(s)://host:port, with or without /v1; None takes LIGHTLLM_BASE_URL,
    OPENAI_BASE_URL or http://localhost:8000. `timeout`: seconds for one whole attempt
    (of a stream: for the wait for its next bytes), None for ever, or a Timeout; looking
    up a host name, which Python cannot interrupt, is not covered. `max_retries`: further
    attempts after connection errors, timeouts, 408, 409, 429 and >= 500.

    `tool_mode`: "server" sends tools to the server; "prompt" writes them into a copy of
    the system message and reads the calls here: the same on every build, streamed or
    not. `api`: "generate" is the native API, also chosen by a base_url that ends in
    /generate; there `render(messages, tools) -> str` makes another prompt than ChatML,
    and `image_tag` stands for an image in it. `image_root`: None lets messages name any
    file, a folder only files in it, False none. `max_image_side`, in pixels: larger
    images are scaled down, with Pillow. `ssl_context`: instead of the verifying default.

    Raises ValueError or TypeError for what cannot work, before anything is sent.
    """

    _base_url = ""

    def __init__(
        self,
        api_key: str | Callable[[], str] | None = None,
        base_url: str | None = None,
        timeout: float | Timeout | NotGiven | None = DEFAULT_TIMEOUT,
        *,
        max_retries: int = DEFAULT_MAX_RETRIES,
        default_headers: Mapping[str, Any] | None = None,
        default_query: Mapping[str, object] | None = None,
        organization: str | None = None,
        project: str | None = None,
        tool_mode: Literal["server", "prompt"] = "server",
        api: Literal["chat", "generate"] | None = None,
        render: Callable[[list[Any], list[Any] | None], str] | None = None,
        image_tag: str = "<|vision_start|><|vision_end|>",
        image_root: str | os.PathLike[str] | Literal[False] | None = None,
        max_image_side: int | None = None,
        ssl_context: ssl.SSLContext | None = None,
        **unknown: NoReturn,
    ) -> None:
        for name in unknown:
            raise TypeError(_unknown_option(name))
        default_headers = _hidden(default_headers or {})
        if not (api_key is None or isinstance(api_key, str) or callable(api_key)):
            raise TypeError("api_key is a str or a callable that returns one")
        if not callable(api_key):  # from here on, no variable shows it
            api_key = _Secret(_environment("API_KEY") if api_key is None else api_key)
            api_key = _checked_key(api_key)
        self.api_key = api_key
        self.base_url = base_url or _environment("BASE_URL") or "http://localhost:8000"
        self.timeout = _checked_timeout(timeout, DEFAULT_TIMEOUT)
        self.max_retries = _checked_retries(max_retries)
        self.default_headers = default_headers
        self.default_query = dict(default_query or {})
        self.organization = organization
        self.project = project
        self.tool_mode = _one_of("tool_mode", tool_mode, ("server", "prompt"))
        self.api = _one_of("api", api, (None, "chat", "generate"))
        self.render = render
        self.image_tag = image_tag
        self.image_root = image_root
        self.max_image_side = max_image_side
        self.ssl_context = ssl_context
        _merged_headers(self.default_headers)  # refuses a bad one now, not at a request
        self._merged: tuple[Any, dict[str, str]] = ((), {})
        self._transport = _Transport(ssl_context)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self._transport)
        self.chat = Chat(self)
        self.completions = Completions(self)
        self.models = Models(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self.base_url!r})"

    @property
    def base_url(self) -> str:
        """What routes are appended to; setting it checks it and completes its /v1."""
        return self._base_url

    @base_url.setter
    def base_url(self, url: str) -> None:
        self._base_url = _checked_base_url(str(url))

    @property
    def beta(self) -> Self:
        """`client.beta.chat` is `client.chat`."""
        return self

    @property
    def with_raw_response(self) -> _RawNamespaces:
        """The same namespaces, whose calls return the Response, with `.parse()`."""
        return _RawNamespaces(self)

    def copy(
        self,
        *,
        set_default_headers: Mapping[str, Any] | None = None,
        set_default_query: Mapping[str, object] | None = None,
        **changes: Any,
    ) -> Self:
        """A client with other options on the same connections. `default_headers` and
        `default_query` are merged with this client's, the `set_` forms replace them."""
        options = self.__getstate__()
        replaced = {
            "default_headers": set_default_headers,
            "default_query": set_default_query,
        }
        for name, value in replaced.items():
            kept = options[name] if value is None else value
            options[name] = {**kept, **(changes.pop(name, None) or {})}
        for name, value in changes.items():
            if not isinstance(value, NotGiven):
                options[name] = value
        twin = type(self)(**options)
        if twin.ssl_context is self.ssl_context:
            twin._transport, twin._opener = self._transport, self._opener
        return twin

    with_options = copy

    def __getstate__(self) -> _Json:
        names = _client_options()
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, options: _Json) -> None:
        LightLLMClient.__init__(self, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections, the copies' too; every later request fails."""
        self._transport.close()

    def is_closed(self) -> bool:
        return self._transport.closed

    def get(self, path: str, **options: Any) -> Any:
        """The decoded JSON of a GET of any route, from the server's root:
        `client.get("/token_load")`. Options: extra_headers, extra_query, timeout."""
        return self.models._request("GET", self._rooted(path), None, None, options)

    def post(self, path: str, *, body: Any = None, **options: Any) -> Any:
        """The same for a POST: `client.post("/tokens", body={"text": "hello"})`."""
        return self.models._request("POST", self._rooted(path), body, None, options)

    def health(self, *, timeout: float = 5.0) -> Health:
        """Whether the server is ready, told within `timeout` seconds. A LightLLM of 2025
        may take 100 s to answer for the first time: it generates two tokens for it."""
        try:
            self.copy(max_retries=0, timeout=timeout).get("/health")
        except APIError as error:
            return Health(False, error.message)
        return Health(True, f"{self._rooted('health')} answers")

    def _rooted(self, path: str) -> str:
        return re.sub("/(v1|generate)$", "", self._base_url) + "/" + path.lstrip("/")


OpenAI = LightLLMClient


class Chat:
    """`client.chat`"""

    def __init__(self, client: LightLLMClient, raw: bool = False) -> None:
        self.completions = ChatCompletions(client, raw)

    @property
    def with_raw_response(self) -> Chat:
        return Chat(self.completions._client, True)


class _RawNamespaces:
    def __init__(self, client: LightLLMClient) -> None:
        self.chat = Chat(client, True)
        self.completions = Completions(client, True)
        self.models = Models(client, True)


# --- endpoints ---
# What can be asked. Options are written once: the documented ones, with their defaults,
# in the signatures, the others in the TypedDicts, which serve type checkers, completion
# and the check for misspelt names. An option that is None is not sent: the server's own
# default applies. NOT_GIVEN takes the default shown. `extra_body` wins over everything.


class _CallOptions(TypedDict, total=False):
    extra_headers: Mapping[str, Any] | None
    extra_query: Mapping[str, object] | None
    extra_body: Mapping[str, object] | None
    timeout: float | Timeout | NotGiven | None


class _CommonOptions(_CallOptions, total=False):
    model: Required[str | None]
    temperature: float | NotGiven | None
    top_p: float | NotGiven | None
    top_k: int | NotGiven | None
    max_tokens: int | NotGiven | None
    stop: str | Sequence[str] | NotGiven | None
    presence_penalty: float | NotGiven | None
    frequency_penalty: float | NotGiven | None
    repetition_penalty: float | NotGiven | None
    do_sample: bool | NotGiven | None
    ignore_eos: bool | NotGiven | None
    logit_bias: Mapping[str, int] | NotGiven | None
    n: int | NotGiven | None
    response_format: Any
    seed: int | NotGiven | None
    stream_options: Mapping[str, Any] | NotGiven | None
    user: str | NotGiven | None


class ChatOptions(_CommonOptions, total=False):
    """The options of `chat.completions.create`: openai's, and LightLLM's own."""

    messages: Required[Iterable[Any]]
    logprobs: bool | NotGiven | None
    tools: Iterable[Any] | NotGiven | None
    tool_mode: Literal["server", "prompt"] | NotGiven
    tool_choice: Any
    audio: Any
    character_settings: Any
    chat_template_kwargs: Mapping[str, Any] | NotGiven | None
    function_call: Any
    functions: Any
    max_completion_tokens: int | NotGiven | None
    metadata: Mapping[str, str] | NotGiven | None
    modalities: Any
    moderation: Any
    parallel_tool_calls: bool | NotGiven | None
    prediction: Any
    prompt_cache_key: str | NotGiven | None
    prompt_cache_options: Any
    prompt_cache_retention: Any
    reasoning_effort: str | NotGiven | None
    role_settings: Any
    safety_identifier: str | NotGiven | None
    separate_reasoning: bool | NotGiven | None
    service_tier: str | NotGiven | None
    store: bool | NotGiven | None
    stream_reasoning: bool | NotGiven | None
    top_logprobs: int | NotGiven | None
    verbosity: str | NotGiven | None
    web_search_options: Any


class CompletionOptions(_CommonOptions, total=False):
    """The options of `completions.create`."""

    prompt: Required[str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]]
    best_of: int | NotGiven | None
    echo: bool | NotGiven | None
    logprobs: int | NotGiven | None
    suffix: str | NotGiven | None


class _Resource:
    """A namespace of the client; with `raw`, its calls return the Response."""

    def __init__(self, client: LightLLMClient, raw: bool = False) -> None:
        self._client = client
        self._raw = raw

    @property
    def with_raw_response(self) -> Self:
        """The same calls, returning the Response, with `.parse()`."""
        return type(self)(self._client, True)

    def _request(
        self, method: str, url: str, body: Any, build: Any, call: _Json
    ) -> Any:
        """What `build` makes of the JSON reply."""
        _hide_headers(call)
        response = _Exchange(self._client, method, url, body, **call).whole(build)
        if isinstance(response._parsed, BaseModel):
            response._parsed._request_id = response.request_id
        return response if self._raw else response._parsed

    def _asked(self, url: str, body: _Json, assembly: _Assembly, call: _Json) -> Any:
        """The answer that the assembly makes of the reply, or the Stream it feeds."""
        if not assembly.streams:
            return self._request("POST", url, body, assembly.whole, call)
        exchange = _Exchange(self._client, "POST", url, body, **call)
        response, reply = exchange.opened()
        stream: Any = Stream(_StreamSource(response, reply, assembly, exchange))
        if not self._raw:
            return stream
        import copy

        raw = copy.copy(response)  # the stream's own would keep a dropped stream alive
        raw._parsed = stream
        return raw


class ChatCompletions(_Resource):
    """`client.chat.completions`"""

    @overload
    def create(
        self, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> Stream[ChatCompletionChunk]: ...

    @overload
    def create(
        self,
        *,
        stream: Literal[False] | NotGiven | None = ...,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...

    @overload
    def create(
        self, *, stream: bool, **options: Unpack[ChatOptions]
    ) -> ChatCompletion | Stream[ChatCompletionChunk]: ...

    def create(
        self,
        *,
        model: str | None,
        messages: Iterable[Any],
        temperature: float | NotGiven | None = 0.6,
        top_p: float | NotGiven | None = 0.95,
        max_tokens: int | NotGiven | None = 10000,
        stop: str | Sequence[str] | NotGiven | None = None,
        presence_penalty: float | NotGiven | None = 1.1,
        logprobs: bool | NotGiven | None = False,
        tools: Iterable[Any] | NotGiven | None = None,
        top_k: int | NotGiven | None = 50,
        repetition_penalty: float | NotGiven | None = 1.0,
        stream: bool | NotGiven | None = NOT_GIVEN,
        **options: Any,
    ) -> Any:
        """A ChatCompletion, or with `stream=True` a Stream of ChatCompletionChunks.

        `messages`: {"role": str, "content": str | list of parts}, or the messages of
        earlier answers. Parts: {"type": "text", "text": str}; {"type": "image_url",
        "image_url": URL | {"url": URL}} with a file://, data: or http(s):// URL or a PIL
        image. `tools`: openai's schemas, or Python functions. `max_tokens=None` leaves
        the limit to the server, which on builds of 2025 is 16; `max_completion_tokens`
        alone sets it too. `stop` strings are cut off the answer. See ChatOptions for
        the rest.

        Raises TypeError for an unknown option and ValueError for what cannot be sent,
        before anything is; then APIStatusError, APIConnectionError, APITimeoutError or
        APIResponseValidationError.
        """
        body, call = _split(locals(), ChatCompletions.create, ChatOptions)
        client = self._client
        tools = _tool_list(body.pop("tools", None))
        mode = body.pop("tool_mode", client.tool_mode)
        body["messages"] = _sendable_messages(body["messages"], client)
        if "max_completion_tokens" in body and body.get("max_tokens", 10000) == 10000:
            body["max_tokens"] = body["max_completion_tokens"]
        extra = call.pop("extra_body", None) or {}
        assembly = _Assembly(True, {**body, **extra}, tools)
        url = client.base_url + "/chat/completions"
        if client.api == "generate" or client.base_url.endswith("/generate"):
            url = client._rooted("generate_stream" if assembly.streams else "generate")
            assembly.native = _NativeReplies(body.get("model"))
            body = _generate_body(body, tools, client)
        elif _one_of("tool_mode", mode, ("server", "prompt")) == "prompt":
            choice = body.get("tool_choice")
            body["messages"] = _flattened(body["messages"], tools, choice)
            body["tool_choice"] = "none"  # or builds of 2025 answer 400 to calls
        elif tools:
            body["tools"] = tools
            assembly.spoils = True
        return self._asked(url, {**body, **extra}, assembly, call)


class Completions(_Resource):
    """`client.completions`: a prompt in, its continuation out: `.choices[0].text`."""

    @overload
    def create(
        self, *, stream: Literal[True], **options: Unpack[CompletionOptions]
    ) -> Stream[Completion]: ...

    @overload
    def create(
        self,
        *,
        stream: Literal[False] | NotGiven | None = ...,
        **options: Unpack[CompletionOptions],
    ) -> Completion: ...

    @overload
    def create(
        self, *, stream: bool, **options: Unpack[CompletionOptions]
    ) -> Completion | Stream[Completion]: ...

    def create(
        self,
        *,
        model: str | None,
        prompt: Any,
        temperature: float | NotGiven | None = 0.6,
        top_p: float | NotGiven | None = 0.95,
        max_tokens: int | NotGiven | None = 10000,
        stop: str | Sequence[str] | NotGiven | None = None,
        presence_penalty: float | NotGiven | None = 1.1,
        top_k: int | NotGiven | None = 50,
        repetition_penalty: float | NotGiven | None = 1.0,
        do_sample: bool | NotGiven | None = True,
        stream: bool | NotGiven | None = NOT_GIVEN,
        **options: Any,
    ) -> Any:
        """A Completion, or with `stream=True` a Stream of Completions.

        `prompt`: str, list of str, or token ids. LightLLM wants a `model` here.
        `do_sample` is sent because builds of 2025 are greedy without it.
        """
        body, call = _split(locals(), Completions.create, CompletionOptions)
        body.update(call.pop("extra_body", None) or {})
        url = self._client.base_url + "/completions"
        return self._asked(url, body, _Assembly(False, body), call)


class Models(_Resource):
    """`client.models`: LightLLM serves one model, and lists it from April 2026 on."""

    def list(self, **options: Any) -> ModelList:
        """The served models. Raises NotFoundError where a build has no list."""

        def build(data: Any) -> ModelList:
            return ModelList([Model.model_validate(model) for model in data["data"]])

        url = self._client.base_url + "/models"
        models: ModelList = self._request("GET", url, None, build, options)
        return models

    def retrieve(self, model: str, **options: Any) -> Model:
        """The served model of that id. Raises NotFoundError where there is none."""
        if not model:
            raise ValueError("models.retrieve() needs the id of a model")
        _hide_headers(options)
        response: Any = Models(self._client, True).list(**options)
        served = {found.id: found for found in response.parse()}
        if model not in served:
            message = f"no model {model!r} at {response.url}, only {list(served)}"
            raise NotFoundError(message, response=response)
        response._parsed = served[model]
        found: Model = response if self._raw else served[model]
        return found


# --- streams ---
# A chunk comes out for each event that came in, its text, calls and finish_reason put
# right; a plain reply is put right as a stream of one piece. A stream is whole after
# [DONE], or after a finish_reason and a clean end of the body; anything else raises. A
# stream that is left is closed, never drained: that makes LightLLM stop generating.


class Stream(Generic[_Answer]):
    """The chunks of one answer, each as soon as its bytes are there.

    Raises APIConnectionError or APITimeoutError where the answer is cut off, APIError
    with the server's words where it reports an error; `error.partial` is what had come.
    `.response` has status and headers. `with`, `close()` and dropping it end it at once.
    """

    def __init__(self, source: _StreamSource) -> None:
        self.response = source.response
        self._source = source
        self._chunks = source.chunks()  # holds the source and not us: dropped, we close

    def __iter__(self) -> Iterator[_Answer]:
        return self

    def __next__(self) -> _Answer:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise self._source.outcome()
        answer: _Answer = chunk
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection now; a loop in another thread gets an error at once."""
        self._source.close()

    def get_final_completion(self) -> Any:
        """The whole answer, after reading what is left of it: a ChatCompletion with
        content, tool_calls, reasoning, usage, finish_reason (of `completions`: a
        Completion). Raises as the loop does."""
        for _ in self:
            pass
        return self._source.assembly.completion()


# --- functions as tools ---
# `tools=[search, visit]`: the schema of a Python function comes from its signature and
# docstring; `run_tool` calls the right one. Types: str, int, float, bool, list, dict,
# Optional, Union, Literal, Enum; others are a TypeError: a guess would be wrong.


def run_tool(call: Any, tools: Iterable[Any]) -> str:
    """The text for the `tool` message that answers a call of `message.tool_calls`: what
    the function of that name returns, a str as it is, anything else as JSON.

    An unknown name, arguments that do not fit and a TypeError or ValueError of the
    function come back as text that the model can act on. OPINION: what else the function
    raises is the caller's business, and is raised.
    """
    asked = _as_dict(call, "a tool call")["function"]
    name, text = asked["name"], asked.get("arguments")
    functions = {getattr(f, "__name__", ""): f for f in tools if callable(f)}
    if name not in functions:
        return f"Error: there is no tool {name!r}, only {', '.join(sorted(functions))}."
    try:
        arguments = _parse_json(text or "{}")
        for key, kind in _hints(functions[name]).items():
            if key in arguments and hasattr(kind, "__members__"):  # an Enum
                arguments[key] = kind(arguments[key])
        result = functions[name](**arguments)
        if not isinstance(result, str):
            result = json.dumps(result, ensure_ascii=False, default=str)
        return result
    except (TypeError, ValueError) as error:
        return f"Error: {name}({text}) failed: {error}"


# ======================================================================================
# the fold: below is the machinery, nothing that a user imports
# ======================================================================================

# --- options ---
# What the client and its calls take: checks, and what a misspelt name should have been.


class _Secret(str):
    """A str whose repr shows nothing: tools print the variables of tracebacks."""

    def __repr__(self) -> str:
        return "'***'"


def _hidden(headers: Mapping[str, Any]) -> _Json:
    """Headers whose repr shows no value: one may be a key."""
    shown = (NotGiven, type(None))
    return {n: v if isinstance(v, shown) else _Secret(v) for n, v in headers.items()}


def _environment(name: str) -> str:
    found = os.environ.get("LIGHTLLM_" + name) or os.environ.get("OPENAI_" + name)
    return found or ""


def _client_options() -> list[str]:
    keywords = LightLLMClient.__init__.__kwdefaults__ or {}
    return ["api_key", "base_url", "timeout", *keywords]


def _unknown_option(name: str) -> str:
    if name == "http_client":
        return "no http_client here: HTTP_PROXY, SSL_CERT_FILE and ssl_context= instead"
    return f"LightLLMClient takes no {name!r}: {_suggestion(name, _client_options())}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"it takes {sorted(known)}"


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} is one of {allowed}, not {value!r}")
    return value


def _checked_key(key: _Secret) -> _Secret:
    key = _Secret(key.strip())
    if _UNSENDABLE.search(key):
        raise ValueError("api_key holds a line break or what else no header takes")
    return key


def _checked_timeout(timeout: Any, default: Any) -> Any:
    if isinstance(timeout, NotGiven):
        return default
    if timeout is None or hasattr(timeout, "connect"):
        return timeout
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is in seconds, None or a Timeout, not {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout is more than 0 seconds, not {timeout!r}")
    return timeout


def _checked_retries(retries: Any) -> int:
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"max_retries is an int, not {retries!r}")
    if retries < 0:
        raise ValueError(f"max_retries is 0 or more, not {retries}")
    return retries


def _checked_base_url(url: str) -> str:
    if not re.fullmatch(r"[!-\[\]-~]+", url):
        raise ValueError("base_url holds a space, a backslash or a non-ASCII character")
    try:
        parts = urllib.parse.urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:  # UnicodeError is one
        raise ValueError("base_url has no usable host and port") from None
    if parts.username is not None:
        raise ValueError("base_url holds credentials: use api_key or default_headers")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"base_url begins with http:// or https://, unlike {url!r}")
    if "?" in url or "#" in url:
        raise ValueError("base_url holds a query or fragment: use default_query")
    if not host or port == 0:
        raise ValueError(f"base_url names no host and port: {url!r}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def _hide_headers(options: _Json) -> None:
    """In place: from here on no variable shows a key in extra_headers."""
    if options.get("extra_headers"):
        options["extra_headers"] = _hidden(options["extra_headers"])


def _split(given: _Json, create: Any, kind: Any) -> tuple[_Json, _Json]:
    """The body and the call's own options, of the local variables of `create`."""
    options = given.pop("options")
    _hide_headers(options)
    del given["self"]
    defaults = create.__kwdefaults__
    if options:
        known = {*defaults, *kind.__annotations__, *_CommonOptions.__annotations__}
        for name in options:
            if name not in known and name not in _CallOptions.__annotations__:
                raise TypeError(f"create() has no {name!r}: {_suggestion(name, known)}")
        given.update(options)
    call = {
        name: given.pop(name) for name in _CallOptions.__annotations__ if name in given
    }
    body = {}
    for name, value in given.items():
        value = defaults.get(name) if isinstance(value, NotGiven) else value
        if value is not None and not isinstance(value, NotGiven):
            body[name] = value
    return body, call


# --- messages and images ---
# What a caller wrote -> what every LightLLM build takes, in new dicts: the caller's own
# are never changed, and texts are sent as they are. Image files are read here, since the
# server sees other disks; http(s) URLs are passed on, since fetching what a message names
# would let a message reach into this network.


def _sendable_messages(messages: Any, client: LightLLMClient) -> list[_Json]:
    if isinstance(messages, (str, bytes, dict)):
        raise TypeError(f"messages is a list, not a {type(messages).__name__}")
    sendable = [_sendable_message(message, client) for message in messages]
    if not sendable:
        raise ValueError("messages is empty: LightLLM needs one at least")
    return sendable


def _sendable_message(message: Any, client: LightLLMClient) -> _Json:
    sent = dict(_as_dict(message, "a message"))
    sent["content"] = content = _sendable_content(sent.get("content"), client)
    if sent.get("role") == "developer":
        sent["role"] = "system"  # templates pass over roles that they do not know
    if sent.get("tool_calls"):
        calls = sent["tool_calls"] = [
            _sendable_call(call) for call in sent["tool_calls"]
        ]
        if isinstance(content, str) and _TagParser(calls).calls(content):
            del sent["tool_calls"]  # the content still holds them: once is enough
    return sent


def _as_dict(item: Any, what: str) -> _Json:
    if not isinstance(item, dict) and hasattr(item, "model_dump"):
        item = item.model_dump(exclude_unset=True)  # an object of openai's
    if not isinstance(item, dict):
        raise TypeError(f"{what} is a dict or an answer's object, not {item!r:.80}")
    found: _Json = item
    return found


def _sendable_call(call: Any) -> _Json:
    """LightLLM silently drops a call whose arguments are no JSON text."""
    sent = dict(_as_dict(call, "a tool call"))
    function = sent.get("function")
    if isinstance(function, dict):
        arguments = function.get("arguments") or {}
        if not isinstance(arguments, str):
            arguments = _dump_json(arguments)
        sent["function"] = {**function, "arguments": arguments}
    return sent


def _sendable_content(content: Any, client: LightLLMClient) -> Any:
    """ "" for None, which builds before October 2025 refuse; one string for parts that
    are all text, since templates of text models fail on lists, or drop them."""
    if content is None or isinstance(content, (str, dict)):
        return content or ""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else part
        for part in content
    ]
    if all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return "\n".join(str(part.get("text", "")) for part in parts)
    return [_sendable_part(part, client) for part in parts]


def _sendable_part(part: Any, client: LightLLMClient) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image_url":
        return part
    image = part.get("image_url")
    image = image if isinstance(image, dict) else {"url": image}
    return {**part, "image_url": {**image, "url": _image_url(image.get("url"), client)}}


def _image_url(image: Any, client: LightLLMClient) -> str:
    """A data: URL, or the http(s) URL as it is. ValueError names the image and why."""
    side = client.max_image_side
    if hasattr(image, "save"):
        return _data_url(_png(image, side))
    if not isinstance(image, str):
        raise ValueError(f"an image is a URL or a PIL image, not {image!r:.80}")
    scheme = image[:8].partition(":")[0].lower()
    if scheme == "file":
        return _data_url(_scaled(_image_file(image, client.image_root), side, image))
    if scheme == "data" and side and ";base64," in image[:100]:
        try:
            raw = base64.b64decode(image.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"image {image[:40]}...: {error}") from None
        return _data_url(_scaled(raw, side, image[:40]))
    if scheme not in ("data", "http", "https"):
        raise ValueError(f"image {image[:200]!r}: not a URL; a path is file:///path")
    return image


def _image_file(url: str, root: Any) -> bytes:
    """The bytes of a file:// URL. `root` is the client's image_root."""
    parts = urllib.parse.urlsplit(url.replace("?", "%3F").replace("#", "%23"))
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"image {url!r}: a file of another host; use file:///path")
    path = urllib.request.url2pathname(parts.path)
    if "\0" in path:
        raise ValueError(f"image {url!r}: a NUL in its path")
    path = os.path.realpath(path)
    if root is False or (root is not None and not _is_inside(path, root)):
        raise ValueError(f"image {url!r}: image_root does not allow it")
    try:  # a FIFO would block and a device never end: look before reading
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ValueError(f"image {url!r}: not a regular file")
            with open(handle, "rb", closefd=False) as file:
                raw = file.read(MAX_IMAGE_BYTES + 1)
        finally:
            os.close(handle)
    except OSError as error:
        raise ValueError(f"image {url!r}: {error.strerror}") from error
    if len(raw) > MAX_IMAGE_BYTES:
        raise ValueError(f"image {url!r}: larger than {MAX_IMAGE_BYTES} bytes")
    if not _image_type(raw):
        raise ValueError(f"image {url!r}: not a JPEG, PNG, WebP, GIF or BMP image")
    return raw


def _is_inside(path: str, root: Any) -> bool:
    root = os.path.realpath(root)
    try:
        return bool(os.path.commonpath([path, root]) == root)
    except ValueError:  # another drive of Windows
        return False


def _image_type(raw: bytes) -> str:
    """What the first bytes say the image is, whatever its name says; "" for none."""
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return "webp"
    kinds = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp"}
    return next((kind for magic, kind in kinds.items() if raw.startswith(magic)), "")


def _data_url(raw: bytes) -> str:
    text = base64.b64encode(raw).decode("ascii")
    return f"data:image/{_image_type(raw)};base64,{text}"


def _png(image: Any, side: int | None) -> bytes:
    """A PIL image as PNG, scaled down to `side` pixels."""
    if side and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="PNG")
    except OSError:  # a mode that PNG lacks, such as CMYK
        image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _scaled(raw: bytes, side: int | None, name: str) -> bytes:
    if not side:
        return raw
    try:
        from PIL import Image
    except ImportError:
        message = f"image {name!r}: max_image_side needs Pillow: pip install pillow"
        raise ValueError(message) from None
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    try:
        with Image.open(io.BytesIO(raw), formats=kinds) as image:
            return _png(image, side) if max(image.size) > side else raw
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {name!r}: Pillow cannot read it: {error}") from error


# --- prompts ---
# What a server's template would do, done here: the tool block of Hermes and Qwen, calls
# and results as text, ChatML for the native API, and its replies as chat replies. Source:
# the chat templates of Qwen2.5 and Qwen3.

_TOOLS_HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_TOOLS_FOOT = """
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
_SPECIAL_TOKEN = re.compile(r"<\|(?=[^|<>\s]{1,40}\|>)")
_ids = itertools.count(time.time_ns() // 1000)  # other than those of an earlier run


def _chosen(tools: list[_Json], choice: Any) -> tuple[list[_Json], str]:
    """The tools that tool_choice leaves, and the sentence for what it asks."""
    if choice == "none":
        return [], ""
    if choice == "required":
        return tools, "\n\nYou must call at least one of these functions now."
    if not isinstance(choice, dict):
        return tools, ""
    name = (choice.get("function") or {}).get("name")
    tools = [tool for tool in tools if (tool.get("function") or {}).get("name") == name]
    if not tools:
        raise ValueError(f"tool_choice names {name!r}, which is not among the tools")
    return tools, f"\n\nYou must call the function {name} now."


def _flattened(messages: list[_Json], tools: list[_Json], choice: Any) -> list[_Json]:
    """Messages without tool fields: all of it is in their texts."""
    flat: list[_Json] = []
    was_result = False
    for message in messages:
        is_result = message.get("role") in ("tool", "function")
        if is_result and was_result:  # Qwen's templates put neighbours into one turn
            flat[-1]["content"] += "\n" + _result_text(message["content"])
        elif is_result:
            flat.append({"role": "user", "content": _result_text(message["content"])})
        else:
            flat.append(_with_call_text(message))
        was_result = is_result
    shown, wish = _chosen(tools, choice)
    if not shown:
        return flat
    block = _TOOLS_HEAD + "\n".join(map(_dump_json, shown)) + _TOOLS_FOOT + wish
    if flat[0].get("role") != "system":
        return [{"role": "system", "content": block}, *flat]
    content = flat[0]["content"]
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": block}]
    else:
        content = f"{content}\n\n{block}"
    return [{**flat[0], "content": content}, *flat[1:]]


def _result_text(content: Any) -> str:
    text = content if isinstance(content, str) else _dump_json(content)
    if text.lstrip().startswith("<tool_response>"):
        return text
    return f"<tool_response>\n{text}\n</tool_response>"


def _with_call_text(message: _Json) -> _Json:
    texts = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls") or ():
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = arguments if _is_object(arguments) else _dump_json(arguments)
        call_text = f'{{"name": {_dump_json(name)}, "arguments": {arguments}}}'
        texts.append(f"<tool_call>\n{call_text}\n</tool_call>")
    if not message.get("tool_calls"):
        return message
    message = {**message, "content": "\n".join(texts)}
    del message["tool_calls"]
    return message


def _generate_body(body: _Json, tools: list[_Json], client: LightLLMClient) -> _Json:
    """The native API's request for a chat request; what it has no name for is left out."""
    if body.get("stream") and body.get("n", 1) != 1:
        raise ValueError("the native API streams one choice only: leave out n")
    choice = body.get("tool_choice")
    messages = body["messages"]
    if not client.render:
        messages = _flattened(messages, tools, choice)
    images: list[_Json] = []
    for at, message in enumerate(messages):
        content = _prompt_text(message["content"], images, client.image_tag)
        messages[at] = {**message, "content": content}
    if client.render:
        shown = _chosen(tools, choice)[0] or None
        prompt = client.render([_with_decoded_calls(one) for one in messages], shown)
    else:
        prompt = "".join(map(_chatml_turn, messages)) + "<|im_start|>assistant\n"
    names = "temperature top_p top_k presence_penalty frequency_penalty n best_of seed"
    names += " repetition_penalty ignore_eos"
    parameters = {name: body[name] for name in names.split() if name in body}
    parameters["do_sample"] = body.get("do_sample", True)  # 2025: greedy without it
    if "n" in body:
        parameters["best_of"] = body["n"]
    if "max_tokens" in body:
        parameters["max_new_tokens"] = body["max_tokens"]
    if _stop_strings(body.get("stop")):
        parameters["stop_sequences"] = _stop_strings(body["stop"])
    native: _Json = {"inputs": prompt, "parameters": parameters}
    if images:
        native["multimodal_params"] = {"images": images}
    return native


def _chatml_turn(message: _Json) -> str:
    role = str(message.get("role"))
    if not re.fullmatch(r"[\w-]+", role):
        raise ValueError(f"a message has the role {role!r}")
    return f"<|im_start|>{role}\n{message['content']}<|im_end|>\n"


def _prompt_text(content: Any, images: list[_Json], tag: str) -> str:
    """The text of a content, with a tag for each image. A special token in it, such as
    <|im_end|>, gets a space behind its first bar, so that no text forges a turn."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str) or part.get("type") == "text":
            text = part if isinstance(part, str) else str(part.get("text"))
            texts.append(_SPECIAL_TOKEN.sub("<| ", text))
        elif part.get("type") == "image_url":
            url = part["image_url"]["url"]
            data = url.partition(";base64,")[2] if url[:5] == "data:" else ""
            kind = {"type": "base64", "data": data}
            images.append(kind if data else {"type": "url", "data": url})
            texts.append(tag)
        else:
            raise ValueError(f"the native API takes no {part.get('type')!r} part")
    return "\n".join(texts)


def _with_decoded_calls(message: _Json) -> _Json:
    """Hugging Face's templates want the arguments of calls as objects."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call["function"])
        if _is_object(function["arguments"]):
            function["arguments"] = _parse_json(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message


def _stop_strings(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    return [text for text in stops if isinstance(text, str) and text]


class _NativeReplies:
    """Replies of /generate and events of /generate_stream -> those of the chat API."""

    def __init__(self, model: Any) -> None:
        self.finished = False
        created = int(time.time())
        self._facts = {"id": f"gen-{next(_ids)}", "created": created, "model": model}

    def completion(self, data: _Json) -> _Json:
        texts, reasons = data["generated_text"], data.get("finish_reason")
        texts = [texts] if isinstance(texts, str) else texts
        reasons = reasons if isinstance(reasons, list) else [reasons] * len(texts)
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons)):
            message = {"role": "assistant", "content": text}
            choice = {"index": index, "message": message, "finish_reason": reason}
            choices.append(choice)
        facts = {**self._facts, "object": "chat.completion"}
        return {**facts, "choices": choices, "usage": _usage(data)}

    def chunk(self, event: _Json) -> _Json:
        token = event.get("token")
        token = token if isinstance(token, dict) else {}
        self.finished = event.get("finished") is True
        reason = (event.get("finish_reason") or "stop") if self.finished else None
        delta = {"role": "assistant", "content": token.get("text")}
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        chunk = {**self._facts, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": _usage(token)} if self.finished else chunk


def _usage(data: _Json) -> _Json:
    asked, answered = data.get("prompt_tokens"), data.get("count_output_tokens")
    usage: _Json = {"prompt_tokens": asked, "completion_tokens": answered}
    if isinstance(asked, int) and isinstance(answered, int):
        usage["total_tokens"] = asked + answered
    return usage


# --- tool schemas ---
# A Python function -> its schema, for `tools=[search, visit]`.


def _tool_list(tools: Any) -> list[_Json]:
    """Schemas as they are, functions as their schemas."""
    if isinstance(tools, (str, bytes, dict)):
        raise TypeError(f"tools is a list, not a {type(tools).__name__}")
    return [_schema(tool) if callable(tool) else tool for tool in tools or ()]


def _schema(function: Any) -> _Json:
    import inspect

    name = getattr(function, "__name__", "")
    if not re.fullmatch(r"[a-zA-Z_]\w*", name):
        raise TypeError(f"a tool needs a name: write a def for {function!r}")
    text, hints = inspect.getdoc(function) or "", _hints(function)
    described = dict(re.findall(r"^[ \t]*(\w+)(?: \(.*\))?:[ \t]*(\S.*)$", text, re.M))
    parameters, properties = inspect.signature(function).parameters, {}
    for key, parameter in parameters.items():
        named = (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if key not in hints or parameter.kind not in named:
            raise TypeError(f"{name}: {parameter} needs a type, or cannot be named")
        properties[key] = _type_schema(hints[key], f"{name}: {parameter}")
        if key in described:
            properties[key]["description"] = described[key]
    required = [key for key, one in parameters.items() if one.default is one.empty]
    taken = {"type": "object", "properties": properties, "required": required}
    first = " ".join(re.split(r"\n\s*\n", text)[0].split())
    schema = {"name": name, "description": first, "parameters": taken}
    return {"type": "function", "function": schema}


def _hints(function: Any) -> _Json:
    import typing

    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise TypeError(f"{function!r}: types that cannot be read: {error}") from None


def _type_schema(kind: Any, where: str) -> _Json:
    import typing

    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    names.update({dict: "object", list: "array"})
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if hasattr(kind, "__members__"):  # an Enum
        origin, inner = typing.Literal, tuple(member.value for member in kind)
    if origin in names:
        part = "items" if origin is list else "additionalProperties"
        inside = {part: _type_schema(inner[-1], where)} if inner else {}
        return {"type": names[origin], **inside}
    if origin is typing.Literal and len({type(value) for value in inner}) == 1:
        return {**_type_schema(type(inner[0]), where), "enum": list(inner)}
    if origin is typing.Union or getattr(origin, "__name__", "") == "UnionType":
        options = [option for option in inner if option is not type(None)]
        schemas = [_type_schema(option, where) for option in options]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    raise TypeError(f"{where}: {kind!r} has no schema here; write the dict by hand")


# --- putting answers right ---
# LightLLM leaves stop strings in the text, leaks tags around the calls that it parses,
# leaves calls in the text, repeats ids, streams "" for no arguments, and calls the same
# finish_reason by three names. One path mends all of it: a plain reply goes through it as
# a stream of one piece.


class _ChoiceStream:
    """One choice of a stream: puts its deltas right, and remembers what went out."""

    def __init__(self, stops: list[str], tags: _TagParser | None) -> None:
        self.reason: Any = None
        self.finished = False
        self._text, self._reasoning = io.StringIO(), io.StringIO()
        self._has_text = False
        self._calls: list[_Json] = []
        self._server_calls: dict[Any, _Json] = {}  # by the server's index; None: last
        self._stop = _StopFilter(stops) if stops else None
        self._tags = tags

    def take_delta(self, choice: _Json) -> None:
        """Put the choice of a chat chunk right."""
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice["delta"] = {}
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        if isinstance(reasoning, str):
            self._reasoning.write(reasoning)
        calls: list[_Json] = []
        text = self._taken(delta.get("content"), calls)
        deltas = delta.get("tool_calls")
        if isinstance(deltas, list):
            calls += self._server_deltas(_objects(deltas))
        text = self._ended_by(choice, text, calls)
        if text is not None:
            delta["content"] = text
        if calls or deltas:
            delta["tool_calls"] = calls or None

    def take_text(self, choice: _Json) -> None:
        """Put the choice of a chunk of /v1/completions right."""
        text = self._ended_by(choice, self._taken(choice.get("text"), []), [])
        if text is not None:
            choice["text"] = text

    def end(self) -> _Json:
        """The delta that ends a whole answer whose server did not say why it ended."""
        calls: list[_Json] = []
        text = "" if self.finished else self._finish(self.reason, calls)
        self.reason = self.reason or "stop"
        return {"content": text, "tool_calls": calls or None}

    def message(self) -> _Json:
        """The message so far; of one that is not finished, the calls that are whole."""
        text = self._text.getvalue()
        if not self.finished:
            text += self._tags.held if self._tags else ""
            text += self._stop.held if self._stop else ""
        message: _Json = {"role": "assistant", "content": text}
        if not text and not self._has_text:
            message["content"] = None
        if self._reasoning.tell():
            message["reasoning"] = self._reasoning.getvalue()
        calls = []
        for call in self._calls:
            function = {"name": call["name"], "arguments": "".join(call["arguments"])}
            if self.finished or _is_object(function["arguments"]):
                calls.append(
                    {"id": call["id"], "type": "function", "function": function}
                )
        message["tool_calls"] = calls or None
        return message

    def _taken(self, text: Any, calls: list[_Json]) -> str | None:
        """The text that can go out now; calls that it completes go to `calls`."""
        if not isinstance(text, str):
            return None
        self._has_text = True
        ready: str = self._stop.feed(text) if self._stop else text
        if self._tags:
            ready = self._without_calls(self._tags.feed(ready), calls)
        self._text.write(ready)
        return ready

    def _ended_by(
        self, choice: _Json, text: str | None, calls: list[_Json]
    ) -> str | None:
        reason = choice.get("finish_reason")
        if reason == "function_call":  # 2025 says so with every delta of a call
            self.reason, choice["finish_reason"] = reason, None
        elif reason is not None:
            rest = "" if self.finished else self._finish(reason, calls)
            choice["finish_reason"] = self.reason
            return (text or "") + rest if rest else text
        return text

    def _finish(self, reason: Any, calls: list[_Json]) -> str:
        """Let go of what was held back: the rest of the text, and of the calls."""
        rest = self._stop.finish(reason) if self._stop else ""
        if self._tags:
            rest = self._without_calls(
                self._tags.feed(rest) + self._tags.finish(), calls
            )
        self._text.write(rest)
        for call in self._calls:
            if not any(call["arguments"]):  # LightLLM streams "" for a call without any
                call["arguments"].append("{}")
                calls.append({"index": call["index"], "function": {"arguments": "{}"}})
        if self._calls and reason in ("stop", "function_call", None):
            reason = "tool_calls"
        self._stop = self._tags = None
        self.reason = "stop" if reason == "function_call" else reason
        self.finished = True
        return rest

    def _without_calls(self, pieces: list[str | _Call], calls: list[_Json]) -> str:
        texts = [piece for piece in pieces if isinstance(piece, str)]
        for piece in pieces:
            if not isinstance(piece, str):
                calls.append(self._new_call(piece.name, None, piece.arguments))
        return "".join(texts)

    def _new_call(self, name: str, call_id: Any, arguments: str) -> _Json:
        """Note a call; the delta that begins it."""
        index = len(self._calls)
        if not call_id or any(call_id == call["id"] for call in self._calls):
            call_id = f"call_{index + 1}_{next(_ids)}"
        call = {"index": index, "id": call_id, "name": name, "arguments": [arguments]}
        self._calls.append(call)
        function = {"name": name, "arguments": arguments}
        return {"index": index, "id": call_id, "type": "function", "function": function}

    def _server_deltas(self, deltas: list[_Json]) -> list[_Json]:
        """The server's own deltas, with an index, unique ids and no empty names."""
        if deltas and self._tags:
            self._tags.drop_open_tag()
        settled = []
        for delta in deltas:
            function = delta.get("function")
            function = function if isinstance(function, dict) else {}
            name, call_id = function.get("name"), delta.get("id")
            key = delta["index"] if isinstance(delta.get("index"), int) else None
            arguments = function.get("arguments")
            if not isinstance(arguments, str):
                arguments = "" if arguments is None else _dump_json(arguments)
            call = self._server_calls.get(key)
            fresh = key is None or (call_id and call and call_id != call["server_id"])
            if call is None or (name and fresh):
                settled.append(self._new_call(str(name or ""), call_id, arguments))
                call = self._calls[-1]
                call["server_id"] = call_id
                self._server_calls[key] = self._server_calls[None] = call
            else:
                call["arguments"].append(arguments)
                more = {"arguments": arguments}
                settled.append({"index": call["index"], "function": more})
        return settled


class _Assembly:
    """What a request means for its answer, and the answer: a plain reply, or chunks."""

    def __init__(self, chat: bool, request: _Json, tools: Iterable[_Json] = ()) -> None:
        self.streams = request.get("stream") is True
        self.native: _NativeReplies | None = None
        self.spoils = False  # whether LightLLM of 2025 spoils such a stream
        self.facts: _Json = {}
        self._chat = chat
        self._chunk = (ChatCompletionChunk if chat else Completion).model_validate
        self._stops = _stop_strings(request.get("stop"))
        self._tools = list(tools)
        self._silent = request.get("tool_choice") == "none"  # wanted: no calls are read
        self._choices: dict[int, _ChoiceStream] = {}
        self._usage: Any = None

    def whole(self, data: Any) -> Any:
        """A plain reply put right. Raises where it is none."""
        if self.native:
            data = self.native.completion(data)
        if not data["choices"]:
            raise ValueError("no choices")
        for choice in _objects(data["choices"]):
            text, message = choice.get("text"), choice.get("message")
            if isinstance(message, dict):
                self._settle(choice, message)
            elif isinstance(text, str):
                choice["text"] = self._unstopped(text, choice.get("finish_reason"))
        kind: Any = ChatCompletion if self._chat else Completion
        return kind.model_validate(data)

    def _settle(self, choice: _Json, message: _Json) -> None:
        content, calls = message.get("content"), message.get("tool_calls")
        reason = choice.get("finish_reason")
        if isinstance(content, str):
            content = message["content"] = self._unstopped(content, reason)
        has_tag = "<tool_call>" in str(content)
        if not (calls or has_tag or reason == "function_call"):
            if "tool_calls" in message:
                message["tool_calls"] = None
            return
        tags = None if calls or self._silent else _TagParser(self._tools)
        state = _ChoiceStream([], tags)
        delta = {"content": content, "tool_calls": calls}
        state.take_delta({"delta": delta, "finish_reason": reason})
        state.end()
        message["tool_calls"] = state.message()["tool_calls"]
        if reason or message["tool_calls"]:
            choice["finish_reason"] = state.reason

    def _unstopped(self, text: str, reason: Any) -> str:
        """LightLLM leaves the stop string at the end of a text."""
        if not self._stops:
            return text
        stop = _StopFilter(self._stops)
        return stop.feed(text) + stop.finish(reason)

    def chunk(self, data: _Json) -> Any:
        """The chunk that goes out for an event."""
        if self.native:
            data = self.native.chunk(data)
        if not self.facts:
            names = ("id", "created", "model", "object", "system_fingerprint")
            self.facts = {name: data.get(name) for name in names}
        self._usage = data.get("usage") or self._usage
        if not isinstance(data.get("choices"), list):
            data["choices"] = []
        for choice in _objects(data["choices"]):
            index = choice.get("index")
            index = index if isinstance(index, int) else 0
            state = self._choices.get(index)
            if state is None:
                reads = self._tools and not self._silent
                tags = _TagParser(self._tools) if reads else None
                state = self._choices[index] = _ChoiceStream(self._stops, tags)
            (state.take_delta if self._chat else state.take_text)(choice)
        return self._chunk(data)

    def rest(self) -> Iterator[Any]:
        """The chunk that ends choices whose finish_reason the server left out."""
        choices = [
            self._choice("delta", index, state.end(), state)
            for index, state in self._choices.items()
            if not state.finished
        ]
        if choices:
            yield self._chunk({**self.facts, "choices": choices})

    def is_whole(self) -> bool:
        """Whether every choice has said why it ended."""
        states = self._choices.values()
        return bool(states) and all(state.reason is not None for state in states)

    def completion(self) -> Any:
        """The answer so far."""
        choices = [
            self._choice("message", index, state.message(), state)
            for index, state in sorted(self._choices.items())
        ]
        facts = {**self.facts, "choices": choices, "usage": self._usage}
        if self._chat:
            return ChatCompletion.model_validate({**facts, "object": "chat.completion"})
        return Completion.model_validate({**facts, "object": "text_completion"})

    def _choice(self, name: str, index: int, fields: _Json, state: Any) -> _Json:
        place = {name: fields} if self._chat else {"text": fields["content"]}
        reason = state.reason if state.finished else None
        return {"index": index, **place, "finish_reason": reason}


def _objects(items: Any) -> list[_Json]:
    return [item for item in items if isinstance(item, dict)]


# --- dumps ---
# Answer objects <-> plain data.


def _nested_in(value: Any, kind: Any) -> Any:
    """A field's value with its objects of that kind."""
    if type(value) is dict:
        return kind.model_validate(value)
    if type(value) is list:
        return [kind.model_validate(v) if type(v) is dict else v for v in value]
    return value


def _plain(value: Any, include: Any, exclude: Any, options: _Json) -> Any:
    """A value without classes. `include`, `exclude`: all (True), nothing (False), or
    names as model_dump takes them."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, BaseModel):
        items = value._shown(options)
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    else:
        return value
    plain = {}
    for name, item in items:
        wanted, unwanted = _part(include, name), _part(exclude, name)
        if wanted is not False and unwanted is not True:
            plain[name] = _plain(item, wanted, unwanted, options)
    return list(plain.values()) if isinstance(value, list) else plain


def _part(names: Any, name: Any) -> Any:
    """What an include or exclude says of the value of `name`, in the same terms."""
    if isinstance(names, bool):
        return names
    if isinstance(names, dict):
        inner = names.get(name, names.get("__all__", False))
        return True if inner is ... else inner
    return name in names


# --- stream source ---
# The events of a reply -> the chunks of a Stream.


class _StreamSource:
    """Events of a reply -> chunks. An error is noted for the Stream to raise: here are
    variables that hold what the server wrote."""

    def __init__(
        self,
        response: Response,
        reply: _Reply,
        assembly: _Assembly,
        exchange: _Exchange,
    ) -> None:
        self.response = response
        self.assembly = assembly
        self.error: APIError | None = None
        self._reply = reply
        self._exchange = exchange
        self._ended = False
        response.is_closed = False

    def chunks(self) -> Iterator[Any]:
        decoder, assembly, native = _EventDecoder(), self.assembly, self.assembly.native
        try:
            while not self.error:
                raw = self._reply.read_next()
                for text in decoder.feed(raw) if raw else self._last_events(decoder):
                    data = None if text[:6] == "[DONE]" else self._data(text)
                    if self.error:
                        return
                    if data is not None:
                        yield assembly.chunk(data)
                    if data is None or (native and native.finished):
                        self._ended = True
                        self._reply.finish()
                        yield from assembly.rest()
                        return
        except (OSError, http.client.HTTPException) as cause:
            if _is_foreign_timeout(cause):
                raise
            self._note(self._exchange.broken(cause, "the answer is incomplete"), cause)
        except ValueError as cause:
            self._fail(APIError, str(cause))
        finally:
            self.close()

    def close(self) -> None:
        self.response.is_closed = True
        if not self._ended:
            self._fail(APIConnectionError, "the stream was closed before its end")
            self._reply.abort()

    def outcome(self) -> Exception:
        """What to raise behind the last chunk: a copy, since what was raised holds its
        frames, they the stream, and the stream the error; and so nothing is freed."""
        if not self.error:
            return StopIteration()
        import copy

        error = copy.copy(self.error)
        error.__cause__ = self.error.__cause__
        return error

    def _last_events(self, decoder: _EventDecoder) -> list[str]:
        """The body ended cleanly: so did the answer if it said so, or it was cut."""
        if decoder.finish() or self.assembly.is_whole():
            return ["[DONE]"]
        what = "the stream ended without [DONE] or a finish_reason: incomplete"
        if not self.assembly.facts:
            what = "the stream ended without any event"
        if self.assembly.spoils:
            what += "; LightLLM builds of April to November 2025 spoil streams of"
            what += " requests with tools: pass tool_mode='prompt'"
        self._fail(APIConnectionError, what)
        return []

    def _data(self, text: str) -> _Json | None:
        """The JSON object of an event; None where it is none, or reports an error."""
        try:
            data = _parse_json(text)
        except ValueError:
            data = None
        if isinstance(data, dict) and not data.get("error"):
            return data
        self._note(self._exchange.bad_event(self.response, text, data))
        return None

    def _fail(self, kind: type[APIError], what: str) -> None:
        self._note(self._exchange.error(kind, what))

    def _note(self, error: APIError, cause: BaseException | None = None) -> None:
        if not self.error:
            # without its frames, which lead back to the stream
            error.__cause__ = cause and cause.with_traceback(None)
            error.partial = self.assembly.completion()
            self.error = error


# --- text in pieces ---
# What the readers of streamed text stand on; pure.

_HEAD = 400  # characters at the most that a pattern given to `_matched` takes
_SPACE = re.compile(r"\s*")


class _Scanner:
    """Text that is read while it comes in. Its readers are generators, which ask for
    more text by yielding, so that they can be written as if it were all there."""

    def __init__(self) -> None:
        self._text = ""  # the piece at hand
        self._at = 0  # read up to here
        self._is_last = False  # no more will come
        self._absent: set[str] = set()  # ends that the rest of the text lacks

    def _more(self) -> _Steps[bool]:
        """Wait for more text. False: that was all."""
        if not self._is_last:
            yield
        return not self._is_last

    def _skip(self, pattern: re.Pattern[str]) -> _Steps[None]:
        while True:
            found = pattern.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not (yield from self._more()):
                return

    def _took(self, *tokens: str) -> _Steps[str]:
        """The first of the tokens that stands behind the space here; "" for none. What
        is returned is passed over, as the space is."""
        if not self._text[self._at : self._at + 1].strip():
            yield from self._skip(_SPACE)
        while True:
            rest = self._text[self._at : self._at + 12]
            longer = [token for token in tokens if len(token) > len(rest)]
            if not any(token.startswith(rest) for token in longer):
                break
            if not (yield from self._more()):
                break
        for token in tokens:
            if rest.startswith(token):
                self._at += len(token)
                return token
        return ""

    def _matched(self, pattern: re.Pattern[str]) -> _Steps[re.Match[str] | None]:
        while True:
            found = pattern.match(self._text, self._at)
            if found:
                self._at = found.end()
            elif len(self._text) - self._at < _HEAD and (yield from self._more()):
                continue
            return found

    def _until(self, end: str) -> _Steps[str | None]:
        """The text before an end tag, which is passed over; None: it never comes."""
        pieces = []
        while end not in self._absent:
            at = self._text.find(end, self._at)
            cut = at if at >= 0 else max(self._at, len(self._text) - len(end) + 1)
            pieces.append(self._text[self._at : cut])
            self._at = cut
            if at >= 0:
                self._at += len(end)
                return "".join(pieces)
            if not (yield from self._more()):
                self._absent.add(end)
        return None


# --- tool-call tags ---
# Text -> text and calls; pure. `feed` any pieces, then `finish`: the outcome does not
# depend on the cuts. A region opens at <tool_call>; where it turns out to be no call, its
# tag is let go as text and reading resumes right behind it. The end of JSON is found by
# its brackets and quotes, never by the end tag, which may stand in a string. What was cut
# off never becomes a call. Linear: each piece is scanned once, rescans are bounded.

_RESCANS = 4  # times the text; more takes text made for it, which then is let go whole
_OPENERS = ("<tool_call>", "<think>")
_OPENER = re.compile("|".join(_OPENERS))
_FILLER = re.compile(r"[\s,}]*")
_IN_JSON = re.compile(r"[\"'\[\]{}<]")
_IN_STRING = {'"': re.compile(r'["\\]'), "'": re.compile(r"['\\]")}
_TAG_NAME = re.compile(r"([^<>\n]{1,128})>")
_BARE_NAME = re.compile(r"[\w.-]{1,128}")
_ARG_KEY = re.compile(r"([^<]{1,128})</arg_key>\s{0,64}<arg_value>")


class _TagParser(_Scanner):
    def __init__(self, tools: Iterable[_Json]) -> None:
        super().__init__()
        self._schemas = _parameter_schemas(tools)
        self._start = 0  # where the open region begins
        self._region: list[str] = []  # what earlier pieces hold of it
        self._offset = 0  # of self._text in the whole
        self._rescanned = 0
        self._is_opening = False
        self._depth, self._quote = 0, ""  # in JSON
        self._out: list[str | _Call] = []
        self._steps = self._parse()

    def feed(self, text: str) -> list[str | _Call]:
        """The texts and calls that are certain now, in order."""
        if self._start < self._at:
            self._region.append(self._text[self._start : self._at])
        self._offset += self._at
        self._text, self._at, self._start = self._text[self._at :] + text, 0, 0
        self._out = []
        next(self._steps, None)
        return self._out

    def finish(self) -> list[str | _Call]:
        """The rest: an open region that is no whole call is text."""
        self._is_last = True
        return self.feed("")

    def calls(self, text: str) -> list[_Call]:
        """The calls in a whole text."""
        found = self.feed(text) + self.finish() if "<tool_call>" in text else []
        return [call for call in found if isinstance(call, _Call)]

    @property
    def held(self) -> str:
        """The text that came in and did not go out."""
        return "".join(self._region) + self._text[self._start :]

    def drop_open_tag(self) -> None:
        """The server read the call behind an open tag by itself: that tag and the end
        tag that follows it are no text."""
        if self._is_opening:
            self._text, self._at, self._start, self._region = "", 0, 0, []
            self._is_opening = False
            self._steps = self._parse_behind_end()

    def _parse_behind_end(self) -> _Steps[None]:
        if not (yield from self._took("</tool_call>")):
            self._out.append("".join(self._region) + self._text[self._start : self._at])
        self._region, self._start = [], self._at
        yield from self._parse()

    def _parse(self) -> _Steps[None]:
        while True:
            found = _OPENER.search(self._text, self._at)
            if not found:
                self._let_go(self._certain(*_OPENERS))
                if not (yield from self._more()):
                    self._let_go(len(self._text))
                    return
                continue
            self._let_go(found.start())
            if found[0] == "<think>":
                yield from self._think()
                continue
            self._at += len("<tool_call>")
            calls: list[_Call] = []
            if (yield from self._read_calls(calls)):
                self._out += calls
                self._region, self._start = [], self._at
            else:
                self._fail()

    def _think(self) -> _Steps[None]:
        """Thought is text, whatever stands in it."""
        end = -1
        while end < 0:
            end = self._text.find("</think>", self._at)
            self._let_go(end if end >= 0 else self._certain("</think>"))
            if end < 0 and not (yield from self._more()):
                return

    def _read_calls(self, calls: list[_Call]) -> _Steps[bool]:
        """The region behind an open tag. False: it is no call."""
        self._is_opening = True
        yield from self._took("```json", "```")
        token = yield from self._took("{", "[", "<function=")
        self._is_opening = False
        is_good = bool(token) or (yield from self._bare(calls))
        while is_good:
            if token in ("{", "["):
                self._at -= 1
                is_good = yield from self._json(calls)
            elif token == "<function=":
                is_good = yield from self._function(calls)
            elif token == "<code>":
                is_good = yield from self._code(calls[-1])
            if not is_good:
                return False
            yield from self._skip(_FILLER)
            more = ("{", "[", "<function=", "<code>", "```")
            token = yield from self._took(*more, "</tool_call>", "<tool_call>")
            if token == "<tool_call>":
                self._at -= len(token)
            if token not in more:
                break
        return is_good and (bool(token) or self._is_end())

    def _is_end(self) -> bool:
        """Whether the text ends here, or in the end tag, or in the next open tag."""
        rest = self._text[self._at : self._at + 13]
        if "</tool_call>".startswith(rest):
            self._at = len(self._text)
            return True
        return "<tool_call>".startswith(rest)

    def _json(self, calls: list[_Call]) -> _Steps[bool]:
        pieces = []
        self._depth, self._quote = 0, ""
        while True:
            begin = self._at
            self._scan_json()
            pieces.append(self._text[begin : self._at])
            if not self._depth:
                break
            if self._depth > _MAX_DEPTH:
                return False
            if not self._quote and self._text[self._at : self._at + 1] == "<":
                if self._depth > 1 or not (yield from self._took("</tool_call>")):
                    return False
                self._at -= len("</tool_call>")
                pieces.append("}")  # just the outer brace is missing
                break
            if not (yield from self._more()):
                return False
        found = _calls_in_json("".join(pieces))
        calls += found
        return bool(found)

    def _scan_json(self) -> None:
        """Go to the end of the JSON, to a tag in it, or to the end of the text."""
        text = self._text
        while True:
            pattern = _IN_STRING[self._quote] if self._quote else _IN_JSON
            found = pattern.search(text, self._at)
            mark = found[0] if found else ""
            if not found:
                self._at = len(text)
                return
            if mark == "<" or (mark == "\\" and found.end() == len(text)):
                self._at = found.start()
                return
            self._at = found.end()
            if mark == "\\":
                self._at += 1
            elif self._quote:
                self._quote = ""
            elif mark in "\"'":
                self._quote = mark
            else:
                self._depth += 1 if mark in "{[" else -1
                if not 0 < self._depth <= _MAX_DEPTH:
                    return

    def _code(self, call: _Call) -> _Steps[bool]:
        """Code that stands behind the JSON of its call; any text may be in it."""
        code = yield from self._until("</code>")
        call.values, call.text = {**call.values, "code": (code or "").strip("\n")}, None
        return code is not None

    def _function(self, calls: list[_Call]) -> _Steps[bool]:
        """Qwen3-Coder: <function=f><parameter=p>value</parameter></function>."""
        found = yield from self._matched(_TAG_NAME)
        if not found or not found[1].strip():
            return False
        calls.append(_Call(found[1].strip(), {}))
        tags = ("<parameter=", "</parameter>", "</function>")
        return (yield from self._arguments(calls[-1], _TAG_NAME, *tags))

    def _bare(self, calls: list[_Call]) -> _Steps[bool]:
        """GLM: a name and <arg_key>k</arg_key><arg_value>v</arg_value>; without those
        only a tool that was offered. An end of the text in place of a tag may be a cut."""
        found = _BARE_NAME.match(self._text, self._at)
        while found and found.end() == len(self._text) and (yield from self._more()):
            found = _BARE_NAME.match(self._text, self._at)
        if not found:
            return False
        self._at = found.end()
        calls.append(_Call(found[0], {}))
        tags = ("<arg_key>", "</arg_value>", "</tool_call>", "<tool_call>", "</")
        is_good = yield from self._arguments(calls[-1], _ARG_KEY, *tags)
        return is_good and bool(calls[-1].values or found[0] in self._schemas)

    def _arguments(
        self, call: _Call, key: re.Pattern[str], begin: str, end: str, *last: str
    ) -> _Steps[bool]:
        """Arguments in tags, up to the last tag. `key` matches what is behind `begin`."""
        token = yield from self._took(begin, *last)
        while token == begin:
            found = yield from self._matched(key)
            value = (yield from self._until(end)) if found else None
            if not found or value is None:
                return False
            if end == "</parameter>":  # a line's end on either side belongs to the form
                value = re.sub(r"\A\n|\n\Z", "", value)
            self._set(call, found[1].strip(), value)
            token = yield from self._took(begin, *last)
        if token != "</function>":
            self._at -= len(token)  # the region's end, which is read next
        return bool(token)

    def _set(self, call: _Call, key: str, value: str) -> None:
        schema = self._schemas.get(call.name, {}).get(key)
        call.values[key] = _typed_value(value, schema)

    def _certain(self, *tokens: str) -> int:
        """Up to where the text cannot be the beginning of a token."""
        cut = self._text.rfind("<", max(self._at, len(self._text) - 10))
        rest = self._text[cut:]
        if self._is_last or cut < 0 or not any(t.startswith(rest) for t in tokens):
            return len(self._text)
        return cut

    def _let_go(self, end: int) -> None:
        if end > self._start:
            self._out.append(self._text[self._start : end])
        self._start = self._at = end

    def _fail(self) -> None:
        """The region is no call: let its tag go, and read on behind that."""
        before = "".join(self._region)
        self._region = []
        self._text = before + self._text
        self._at += len(before)
        self._offset -= len(before)
        self._rescanned += self._at - self._start
        may_rescan = self._rescanned <= _RESCANS * (self._offset + self._at)
        self._let_go(self._start + len("<tool_call>") if may_rescan else self._at)


# --- calls in JSON ---
# The text of a call -> its name and arguments. First as JSON; then leniently, where only
# what stands outside of strings is rewritten; then it is no call. Nothing is guessed:
# a wrong call is worse than none.

_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*(?=\{)')
_TOKEN = re.compile(  # strings, Python's words, commas before brackets
    r'"[^"\\]*(?:\\.[^"\\]*)*"'
    r"|'[^'\\]*(?:\\.[^'\\]*)*'"
    r"|\b(?:True|False|None)\b|,(?=\s*[}\]])",
    re.DOTALL,
)
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|.)|"', re.DOTALL)


class _Call:
    """A call that was read. `is_written`: its arguments stand in the text as an object."""

    def __init__(self, name: str, values: _Json, is_written: bool = False) -> None:
        self.name = name
        self.values = values
        self.is_written = is_written
        self.text: str | None = None  # the model's own, where that is JSON

    @property
    def arguments(self) -> str:
        if self.text is None or re.search(r"[\0-\x1f]", self.text):
            return _dump_json(self.values)
        return self.text


def _calls_in_json(text: str) -> list[_Call]:
    """The calls of an object, or of all objects of an array; none if one is no call."""
    is_strict = True
    try:
        data = _parse_json(text)
    except ValueError:
        try:
            data, is_strict = _parse_json(_lenient(text)), False
        except ValueError:
            return []
    calls = []
    for item in data if isinstance(data, list) else [data]:
        call = _call_of(item)
        if not call:
            return []
        calls.append(call)
    if is_strict:
        _keep_texts(calls, text)
    return calls


def _call_of(item: Any) -> _Call | None:
    """The call that an object is."""
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    key = "arguments" if "arguments" in item else "parameters"
    if key not in item and set(item) - {"name", "type", "id"}:
        return None  # arguments beside the name: without them it would be another call
    values = item.get(key)
    if isinstance(values, str):
        try:
            values = _parse_json(values) if values.strip() else {}
        except ValueError:
            return None
    values = {} if values is None else values
    if not isinstance(values, dict) or not item["name"]:
        return None
    return _Call(item["name"], values, values is item.get(key))


def _keep_texts(calls: list[_Call], text: str) -> None:
    """Give the calls of a valid JSON text the very text of their arguments, so that
    numbers and spaces stay as the model wrote them."""
    at = 0
    for call in calls:
        found = _ARGUMENTS.search(text, at) if call.is_written else None
        while found:
            values, at = _DECODER.raw_decode(text, found.end())
            if values == call.values:
                call.text = text[found.end() : at]
                break
            found = _ARGUMENTS.search(text, at)


def _lenient(text: str) -> str:
    """JSON as models write it -> JSON; nothing in a string changes its meaning."""
    return _TOKEN.sub(_strict_token, text)


def _strict_token(found: re.Match[str]) -> str:
    token = found[0]
    if token[0] in "\"'":
        return '"' + _ESCAPE.sub(_strict_escape, token[1:-1]) + '"'
    return {"True": "true", "False": "false", "None": "null"}.get(token, "")


def _strict_escape(found: re.Match[str]) -> str:
    """A valid escape as it is; the backslash of any other is doubled, not dropped."""
    escaped = found[1]
    if escaped is None:
        return r"\""
    if escaped == "'":
        return "'"
    is_valid = len(escaped) > 1 or escaped in '"\\/bfnrt'
    return found[0] if is_valid else "\\" + found[0]


def _parameter_schemas(tools: Iterable[_Json]) -> dict[str, _Json]:
    """The properties of each offered tool, by its name."""
    schemas: dict[str, _Json] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict):
            properties = (function.get("parameters") or {}).get("properties")
            schemas[str(function.get("name"))] = properties or {}
    return schemas


def _typed_value(text: str, schema: Any) -> Any:
    """An untyped value by its schema: text, unless another type is wanted and fits."""
    schema = schema if isinstance(schema, dict) else {}
    kinds: list[Any] = []
    for option in [schema, *schema.get("anyOf", ())]:
        kind = option.get("type") or []
        kinds += [kind] if isinstance(kind, str) else kind
    if not kinds or ("string" in kinds and not ("null" in kinds and text == "null")):
        return text
    try:
        return _parse_json(_lenient(text))
    except ValueError:
        return text


# --- JSON ---
# Text <-> data, for replies, events and tool calls alike. Nothing that a server or a
# model writes does more than raise ValueError.

_MAX_DEPTH = 500  # more can overflow a thread's small stack (mcp python-sdk#3147)
_DECODER = json.JSONDecoder(strict=False)
_dump_json = json.JSONEncoder(ensure_ascii=False).encode
_dump_request = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":")
).encode
_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[{}\]]', re.DOTALL)
_HALF_PAIR = re.compile(  # not behind a backslash, and not the first half of a pair
    r"(\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..)|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def _text(raw: bytes) -> str:
    """UTF-8 whatever a charset says; U+FFFD for what is not, no byte order mark."""
    text = raw.decode("utf-8", "replace")
    return text[1:] if text[:1] == "\ufeff" else text


def _parse_json(text: str) -> Any:
    """Decoded JSON, with U+FFFD for halves of surrogate pairs, which nobody can print.
    Raises ValueError."""
    if "\\ud" in text or "\\uD" in text:
        text = _HALF_PAIR.sub(lambda found: found[1] or r"\ufffd", text)
    if len(text) > _MAX_DEPTH and _is_deep(text):
        raise ValueError("JSON of too many levels")
    try:
        data, end = _DECODER.raw_decode(text)
        if end == len(text):
            return data
    except (ValueError, RecursionError):
        pass
    try:
        return _DECODER.decode(text)  # takes spaces around it too
    except RecursionError:
        raise ValueError("JSON of too many levels") from None


def _is_deep(text: str) -> bool:
    depth = 0
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return False
    for found in _BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > _MAX_DEPTH:
            return True
    return False


def _is_object(text: str) -> bool:
    try:
        return isinstance(_parse_json(text), dict)
    except ValueError:
        return False


def _dump_body(body: Any) -> bytes:
    """A request's body. ValueError: NaN, infinity, half a surrogate pair, too deep."""
    try:
        return _dump_request(body).encode("utf-8")
    except UnicodeEncodeError as error:
        before = error.object[max(0, error.start - 20) : error.start]
        message = f"half a surrogate pair, which is no text, after {before!r}"
        raise ValueError(message) from None
    except RecursionError:
        raise ValueError("the request is nested too deeply") from None


# --- server-sent events ---
# Bytes -> the data of events, by the WHATWG rules; pure. CR, LF and CRLF end a line and
# nothing else does (str.splitlines would split model text at U+2028). The bytes may be
# cut anywhere; each is looked at once.


class _EventDecoder:
    def __init__(self) -> None:
        self._line: list[bytes] = []  # the pieces of the line that has not ended
        self._data: list[bytes] = []  # the data lines of the event that has not ended
        self._size = 0  # of both
        self._after_cr = False
        self._is_first = True

    def feed(self, raw: bytes) -> list[str]:
        """The data of the events that these bytes end. ValueError: one is too large."""
        if self._after_cr and raw[:1] == b"\n":
            raw = raw[1:]
        self._after_cr = raw[-1:] == b"\r"
        if b"\r" in raw:
            raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = raw.split(b"\n")
        self._line.append(lines[0])
        self._size += len(lines[0])
        events = []
        if len(lines) > 1:
            lines[0] = b"".join(self._line)
            self._line = [lines.pop()]
            events = self._ended(lines)
        if self._size > MAX_EVENT_BYTES and not events:  # those go out first
            raise ValueError("an event larger than MAX_EVENT_BYTES")
        return events

    def finish(self) -> bool:
        """Whether [DONE] stands at the end of the body without a line's end."""
        return b"".join(self._line).replace(b" ", b"") == b"data:[DONE]"

    def _ended(self, lines: list[bytes]) -> list[str]:
        if self._is_first and lines[0][:3] == b"\xef\xbb\xbf":
            lines[0] = lines[0][3:]
        self._is_first = False
        events, data = [], self._data
        for line in lines:
            if line[:5] == b"data:":
                data.append(line[6:] if line[5:6] == b" " else line[5:])
                if data == [b"[DONE]"]:  # need not wait for the empty line
                    events.append("[DONE]")
                    data.clear()
            elif line == b"data":
                data.append(b"")
            elif not line:
                events.append(b"\n".join(data).decode("utf-8", "replace"))
                data.clear()
        self._size = len(self._line[0]) + sum(map(len, data))
        return [event for event in events if event]


# --- stop strings ---
# What may come after a stop string is held back; pure.


class _StopFilter:
    """Text up to the first stop string; what could begin one is held back."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._pattern = re.compile("|".join(map(re.escape, stops)))
        self._longest = max(map(len, stops))
        self._tail = ""
        self._cut: list[str] = []  # what came from the stop string on

    @property
    def held(self) -> str:
        return self._tail + "".join(self._cut)

    def feed(self, text: str) -> str:
        if self._cut:
            self._cut.append(text)
            return ""
        text = self._tail + text
        found = self._pattern.search(text)
        at = found.start() if found else max(0, len(text) - self._longest + 1)
        while not found and at < len(text):
            if any(stop.startswith(text[at:]) for stop in self._stops):
                break
            at += 1
        self._tail, self._cut = ("", [text[at:]]) if found else (text[at:], [])
        return text[:at]

    def finish(self, reason: Any) -> str:
        """The rest: what follows a stop string is none if that is why the text ended."""
        if self._cut and reason in ("stop", "tool_calls", "function_call"):
            return ""
        return self.held


# --- requests ---
# One attempt under its clock, and the retries around it. Whatever a server does ends here
# as a whole reply, or as an error of the openai tree with nothing secret in it: keys go
# out of texts and bodies first, and no variable of a frame that raises shows one.

_MAX_REDIRECTS = 5
_LONGEST_RETRY_AFTER = 120.0  # seconds; a server that wants more gets no retry
_UNSENDABLE = re.compile(r"[^\x20-\x7e\x80-\xff]")
_SECRET_HEADERS = ("Authorization", "Proxy-authorization", "Api-key", "X-api-key")


class _Exchange:
    """One request: the attempts at it, and the errors that come of them."""

    def __init__(
        self,
        client: LightLLMClient,
        method: str,
        url: str,
        body: Any,
        extra_headers: Any = None,
        extra_query: Any = None,
        timeout: Any = NOT_GIVEN,
    ) -> None:
        self._client = client
        self._timeout = _checked_timeout(timeout, client.timeout)
        query = _query_string({**client.default_query, **(extra_query or {})})
        self._request = Request(method, url + query)
        self._data = None if body is None else _dump_body(body)
        self._headers = _request_headers(client, self._data, extra_headers or {})
        self._attempts = 0
        if client.is_closed():
            raise self.error(APIConnectionError, "this client is closed")

    def whole(self, build: Callable[[Any], Any] | None) -> Response:
        """The reply with its body, and what `build` makes of it."""
        response, _ = self._answered(True)
        response._parsed, problem = _built(response, build)
        if problem:  # no frame of this error holds the body, which may echo the key
            raise self._invalid(response, problem)
        return response

    def opened(self) -> tuple[Response, _Reply]:
        """The reply of a stream with its head."""
        response, reply = self._answered(False)
        kind = response.headers.get("content-type", "").lower()
        if "json" in kind or "html" in kind:
            response.content = reply.read_error()
            raise self._invalid(response, "no stream of events")
        return response, reply

    def _answered(self, whole: bool) -> tuple[Response, _Reply]:
        """The first good reply, after the retries that are due."""
        while True:
            self._attempts += 1
            try:
                return self._attempt(whole)
            except APIError as error:
                delay = self._retry_delay(error)
                if delay is None:
                    raise
                text = error.message
            import logging

            log, tried = logging.getLogger(__name__), self._attempts
            log.info("attempt %d failed, next in %.1f s: %s", tried, delay, text)
            time.sleep(delay)

    def _attempt(self, whole: bool) -> tuple[Response, _Reply]:
        started, reply = time.monotonic(), None
        try:
            reply = self._followed(_Clock(self._timeout))
            response = Response(self._request, reply.status, reply.headers)
            response.retries_taken = self._attempts - 1
            if not 200 <= reply.status < 300:
                response.content = reply.read_error()
                raise self._status_error(response)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise self._invalid(response, "a coded body, which was not asked for")
            if whole:
                response.content = reply.read(MAX_REPLY_BYTES)
        except BaseException as cause:
            if reply:
                reply.abort()
            is_foreign = _is_foreign_timeout(cause)
            if (
                not isinstance(cause, (OSError, http.client.HTTPException))
                or is_foreign
            ):
                raise
            raise self.broken(cause) from cause
        response._seconds = time.monotonic() - started
        return response, reply

    def _followed(self, clock: _Clock) -> _Reply:
        """The reply, after redirects that keep to origin, method and body."""
        method, url = self._request.method, self._request.url
        reply: Any = None
        for _ in range(_MAX_REDIRECTS + 1):
            # no origin, which is for cookies: finding it out would parse the URL again
            wire = _TimedRequest(url, self._data, self._headers, "", method=method)
            wire.clock = clock
            reply = self._client._opener.open(wire)
            if reply.status not in (307, 308):
                break
            target = _joined(url, reply.headers.get("location", ""))
            if _origin(target) != _origin(url):
                break
            reply.read_error()
            url = target
        found: _Reply = reply
        return found

    def _retry_delay(self, error: APIError) -> float | None:
        """Seconds until the next attempt; None for none."""
        if self._attempts > self._client.max_retries:
            return None
        if isinstance(error, APIStatusError):
            status, headers = error.status_code, error.response.headers
            told = headers.get("x-should-retry")
            retried = status in (408, 409, 429) or status >= 500
            if told == "false" or (told != "true" and not retried):
                return None
            asked = _retry_after(headers)
            if asked:
                return asked if asked <= _LONGEST_RETRY_AFTER else None
        elif not isinstance(error, APIConnectionError):
            return None
        elif hasattr(error.__cause__, "verify_message"):
            return None  # a certificate does not get better
        elif isinstance(error.__cause__, _ProxyError):
            return None
        delay = min(0.5 * 2.0 ** (self._attempts - 1), 8.0)
        return delay * (1 - 0.25 * random.random())

    def error(self, kind: Any, what: str) -> Any:
        """An error without a response."""
        message = f"{self._asked()}: {what}"
        return kind(message=self._redacted(message), request=self._request)

    def broken(self, cause: BaseException, what: str = "") -> APIConnectionError:
        """The error for a connection that could not be made, or broke."""
        tried = f"({self._attempts} attempt{'s' * (self._attempts != 1)})"
        kind: Any = APIConnectionError
        where = _shown_url(self._request.url)
        if self._route().proxy:
            where = f"the proxy {self._route().proxy} (from the environment)"
        if isinstance(cause, _ClockTimeout):
            kind = APITimeoutError
            text = f"no {'more' if what else 'answer'} within {self._timeout} s {tried}"
            hint = "raise timeout=, or stream long answers"
        else:
            reason, hint = _reason(cause)
            lost = (http.client.HTTPException, BrokenPipeError, ConnectionResetError)
            failed = "no reply from" if isinstance(cause, lost) else "cannot reach"
            text = f"{failed} {where} {tried}: {reason}" if not what else reason
        parts = [what, text, hint]
        error: APIConnectionError = self.error(kind, "; ".join(filter(None, parts)))
        return error

    def bad_event(self, response: Response, text: str, data: Any) -> APIError:
        """The error for an event that reports one, or that is no JSON object."""
        if isinstance(data, dict):
            body = self._redacted(data["error"])
            return APIError(_error_text({"error": body}, ""), self._request, body=body)
        what = f"an event is no JSON object: {self._redacted(text[:300])}"
        message = f"{self._asked()}: {what}; the answer is incomplete"
        return APIResponseValidationError(response, message=message, body=None)

    def _invalid(self, response: Response, what: str) -> APIResponseValidationError:
        """The error for a good status with something else than was asked for."""
        body = self._clean(response)
        message = f"{self._asked()} gave status {response.status_code}, but {what}"
        text = _error_text(body, response.text)
        message += f": {text}" if text else ""
        message += "; is base_url that of a LightLLM server?"
        return APIResponseValidationError(response, body, message=message)

    def _status_error(self, response: Response) -> APIStatusError:
        body, status = self._clean(response), response.status_code
        server = InternalServerError if status >= 500 else APIStatusError
        kind, hint = _STATUS_ERRORS.get(status, (server, ""))
        text = _error_text(body, response.text) or "no reason given"
        if "location" in response.headers and 300 <= status < 400:
            url = _joined(self._request.url, response.headers["location"])
            text = f"a redirect to {_shown_url(url)}, which is not followed"
            hint = "check base_url: scheme, host, port, and whether it asks for a login"
        message = f"Error code: {status} from {self._asked()}: {text}"
        message += f"; {hint}" if hint else ""
        if isinstance(body, dict) and "error" in body:
            body = body["error"]
        return kind(message, response=response, body=body)

    def _route(self) -> _Route:
        return self._client._transport.route(urllib.request.Request(self._request.url))

    def _asked(self) -> str:
        return f"{self._request.method} {_shown_url(self._request.url)}"

    def _clean(self, response: Response) -> Any:
        """Take secrets out of a response that goes into an error; its decoded body."""
        response.content = self._redacted(response.text).encode("utf-8")
        response.headers = Headers(self._redacted(response.headers))
        response.request_id = response.headers.get("x-request-id")
        try:
            return self._redacted(response.json())
        except ValueError:
            return response.text

    def _redacted(self, value: Any) -> Any:
        """`value` without the secrets of this request's headers."""
        headers = {**self._headers, **self._route().login}
        for name in _SECRET_HEADERS:
            secret = headers.get(name, "").rpartition(" ")[2]
            if secret:  # a short one, such as "EMPTY", is one only as a whole word
                edges = r"(?<!\w){}(?!\w)" if len(secret) < 8 else "{}"
                value = _replaced(value, edges.format(re.escape(secret)))
        return value


# --- request parts ---
# Texts, URLs and headers of requests and their errors, without state.


def _replaced(value: Any, pattern: str) -> Any:
    if isinstance(value, str):
        return re.sub(pattern, "***", value)
    if isinstance(value, dict):
        return {
            _replaced(name, pattern): _replaced(item, pattern)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_replaced(item, pattern) for item in value]
    return value


def _built(response: Response, build: Callable[[Any], Any] | None) -> tuple[Any, str]:
    """(answer, ""), or (None, what is wrong with the reply)."""
    try:
        data = response.json()
    except ValueError:
        return None, "not with JSON" if response.content.strip() else "with nothing"
    try:
        return (build(data) if build else data), ""
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None, "with something else than was asked for"


def _reason(cause: BaseException) -> tuple[str, str]:
    """Why a connection failed, in words, and what to try."""
    certificate = getattr(cause, "verify_message", "")
    text = certificate or getattr(cause, "strerror", "") or str(cause) or repr(cause)
    if certificate:
        return f"its certificate: {text}", "see SSL_CERT_FILE and ssl_context="
    if isinstance(cause, ConnectionRefusedError):
        return text, "is a LightLLM server listening there?"
    if isinstance(cause, socket.gaierror):
        return text, "check the host name in base_url"
    if "WRONG_VERSION_NUMBER" in str(cause):
        return text, "does that port speak https?"
    return text, ""


def _error_text(body: Any, text: str) -> str:
    """What a server says of an error, in any of LightLLM's four shapes; cut to fit."""
    found = body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    if isinstance(found, list):  # FastAPI: which field, and what is wrong with it
        errors = [error for error in found[:3] if isinstance(error, dict)]
        places = [".".join(map(str, error.get("loc") or ())) for error in errors]
        pairs = zip(places, errors)
        found = "; ".join(f"{place}: {error.get('msg')}" for place, error in pairs)
    found = " ".join((found if isinstance(found, str) else text).split())
    return found if len(found) <= 300 else found[:300] + "..."


def _retry_after(headers: Headers) -> float:
    """The seconds that a server asks for before the next attempt; 0 if none."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        text = headers.get(name, "")
        try:
            seconds = float(text) / unit
        except ValueError:
            seconds = _seconds_until(text)
        if 0 < seconds < float("inf"):
            return seconds
    return 0.0


def _seconds_until(date: str) -> float:
    from email.utils import mktime_tz, parsedate_tz

    parsed = parsedate_tz(date)
    try:
        return mktime_tz(parsed) - time.time() if parsed else 0.0
    except (OverflowError, ValueError):
        return 0.0


def _origin(url: str) -> tuple[Any, ...]:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return parts.scheme, parts.hostname, port, parts.username
    except ValueError:
        return ()


def _joined(url: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(url, location)
    except ValueError:
        return location


def _shown_url(url: str) -> str:
    """A URL as messages show it: its query and credentials may be secret."""
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0].partition("#")[0])


def _query_string(query: Mapping[str, object]) -> str:
    pairs = []
    for name, value in query.items():
        listed = isinstance(value, (list, tuple))
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None and not isinstance(item, NotGiven):
                text = str(item).lower() if isinstance(item, bool) else str(item)
                pairs.append((name + "[]" * listed, text))
    return "?" + urllib.parse.urlencode(pairs) if pairs else ""


def _request_headers(client: LightLLMClient, data: Any, extra: Any) -> dict[str, str]:
    key: Any = client.api_key
    key = _Secret(key() if callable(key) else key)  # now no variable shows it
    key = _checked_key(key)
    facts = (key, data is None, client.organization, client.project)
    asked = (facts, client.default_headers, extra)
    known, headers = client._merged  # of the last request: most have the same
    if known != asked:
        own = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "lightllm_client/" + __version__,
            "Content-Type": omit if data is None else "application/json",
            "Authorization": _Secret("Bearer " + key) if key else omit,
            "OpenAI-Organization": client.organization,
            "OpenAI-Project": client.project,
        }
        headers = _merged_headers(own, client.default_headers, extra)
        client._merged = ((facts, dict(client.default_headers), dict(extra)), headers)
    return headers


def _merged_headers(*layers: Mapping[str, Any]) -> dict[str, str]:
    """The headers of all layers; the later ones win, in any case of their names."""
    merged: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.items():
            name = name.capitalize()  # as urllib does
            merged.pop(name, None)
            if value is not None and not isinstance(value, NotGiven):
                merged[name] = _Secret(value)
                if _UNSENDABLE.search(merged[name]) or re.search(r"[^!-9;-~]", name):
                    raise ValueError(f"the header {name!r} holds what no header takes")
    return merged


# --- connections ---
# urllib's OpenerDirector with one handler, which keeps http.client's connections. One
# carries one request at a time, waits no longer than the clock says, and is kept only
# behind a reply that ended exactly. A request that was sent whole is never sent again
# from here. There is no lock: a list's append and pop are atomic.

_READ_SIZE = 65536
_SEND_SIZE = 262144  # bytes of a large body between two looks for an early reply
_SEND_SECONDS = 0.1  # and the longest wait between them
_LONGEST_WAIT = 3e6  # seconds; more overflows what the system takes
_DIAL_SECONDS = 10.0  # for an address of a host that has others left to try
# routers forget a connection that is silent for two minutes; the last name is macOS's
_TCP_OPTIONS = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60}
_TIMEOUTS = (socket.timeout, TimeoutError)  # one and the same since Python 3.10
# what recv says where nothing is there yet: eventlet's sockets, plain ones, TLS
_NOTHING_YET = (None, errno.EAGAIN, errno.EWOULDBLOCK, 2)
# the status line of an error, perhaps behind interim replies
_REFUSAL = re.compile(rb"(?:\A|\n)HTTP/1\.[01] +[345]")


class _ClockTimeout(socket.timeout):
    """An attempt's time is up."""


class _ProxyError(OSError):
    """The proxy refuses or cannot be used; trying again would not help."""


def _is_foreign_timeout(error: BaseException) -> bool:
    """Whether a signal handler raised this: the system's and our own have an errno."""
    return isinstance(error, _TIMEOUTS) and not error.errno


class _Clock:
    """The time that one attempt may still take. A number limits the attempt as a whole,
    a Timeout each phase by itself; both limit each wait for a stream's next bytes."""

    def __init__(self, timeout: Any) -> None:
        self._timeout = timeout
        self.restart("connect")

    def restart(self, phase: str) -> None:
        limit = getattr(self._timeout, phase, self._timeout)
        limit = _LONGEST_WAIT if limit is None else min(limit, _LONGEST_WAIT)
        self._end = time.monotonic() + limit

    def enter(self, phase: str) -> None:
        if hasattr(self._timeout, phase):
            self.restart(phase)

    def left(self) -> float:
        """Seconds for the next wait. Raises _ClockTimeout when there are none."""
        left: float = self._end - time.monotonic()
        if left <= 0:
            raise _ClockTimeout(errno.ETIMEDOUT, "timed out")
        return left


class _TimedRequest(urllib.request.Request):
    """A request with the clock of its attempt."""

    clock: _Clock


class _Connection(http.client.HTTPConnection):
    """Sends requests. What comes back is read by a _Reply."""

    clock: _Clock
    early = b""  # of the reply, if it begins before the request was sent
    is_stale = False  # it broke before the request was sent and before a reply
    idle_since = 0.0
    _timeout = 0.0  # of the socket
    _is_waiting = False
    _is_aborted = False

    def __init__(self, transport: _Transport, route: _Route) -> None:
        super().__init__(route.host, route.port)
        self.transport = transport
        self.route = route
        self._owner = os.getpid()

    def exchange(self, request: _TimedRequest) -> _Reply:
        """Send a request; the reply, its head read."""
        self.clock, self.early, self.is_stale = request.clock, b"", False
        if not self.sock:
            self.connect()
        self.clock.enter("write")
        target = request.selector
        body: Any = request.data or b""
        headers = {"Host": request.host, **request.headers}
        if self.route.proxy and not self.route.tls:
            target = request.full_url
            headers.update(self.route.login)
        if body:
            headers["Content-Length"] = str(len(body))
        try:
            self._send_request(request.get_method(), target, headers, body)
        except _TIMEOUTS:
            raise
        except OSError:
            self.early += self._receive_now() or b""
            self.is_stale = not self.early
            if self.is_stale:
                raise
        self.clock.enter("read")
        return _Reply(self)

    def connect(self) -> None:
        self._dial()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_OPTIONS.items():
            if hasattr(socket, name):
                option = getattr(socket, name)
                self.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if self.route.tls:
            if self.route.proxy:
                self._open_tunnel()
            wrap, sock = self.transport.tls_context().wrap_socket, self.sock
            self.sock = self._call(
                self.clock,
                # a TLS end without close_notify is a cut, not an end
                lambda: wrap(
                    sock, server_hostname=self.host, suppress_ragged_eofs=False
                ),
            )

    def _dial(self) -> None:
        """Connect to the first address that answers."""
        host, port = self.route.dial
        if not host:
            raise _ProxyError("only proxies of the form http://host:port can be used")
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        while found:
            family, kind, protocol, _, address = found.pop(0)
            clock = self.clock
            if found:  # a silent address must leave time for those behind it
                clock = _Clock(min(_DIAL_SECONDS, clock.left() / (1 + len(found))))
            try:
                self.sock, self._timeout = socket.socket(family, kind, protocol), 0.0
                self._call(clock, self.sock.connect, address)
                return
            except OSError as error:
                self.close()
                if not found or _is_foreign_timeout(error):
                    raise
        raise OSError("the host has no address")

    def _open_tunnel(self) -> None:
        """Through the proxy, which gets its own credentials and never the key."""
        target = self.route.authority
        self._send_request("CONNECT", target, {"Host": target, **self.route.login})
        status = _Reply(self).status
        if status >= 300:
            kind = OSError if status >= 500 else _ProxyError
            raise kind(f"the proxy refused to open a tunnel, with status {status}")

    def _send_request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes = b""
    ) -> None:
        """Send a request, or as much of it as the server takes: one that refuses a large
        body says so at once and closes, and a reset can destroy a reply that was not
        received yet. A view's repr shows no header."""
        lines = map(": ".join, headers.items())
        first = f"{method} {target} HTTP/1.1"
        head = _Secret("\r\n".join([first, *lines, "", ""]))
        view = memoryview(body)
        piece = memoryview(head.encode("latin-1") + view[:_READ_SIZE])
        self._call(self.clock, self.sock.sendall, piece)
        view = view[_READ_SIZE:]
        while view and not _REFUSAL.search(self.early):
            self.clock.left()  # raises when all time is up
            clock, piece = _Clock(_SEND_SECONDS), view[:_SEND_SIZE]
            try:
                view = view[self._call(clock, self.sock.send, piece) :]
            except _ClockTimeout:
                pass
            self.early += self._receive_now() or b""

    def _receive_now(self) -> bytes | None:
        """What is there: b"" if the connection ended or broke, None for nothing yet."""
        self._timeout = 0.0
        try:
            self.sock.settimeout(0.0)
            raw: bytes = self.sock.recv(_READ_SIZE)
            return raw
        except OSError as error:
            if _is_foreign_timeout(error) and str(error) != "timed out":  # of eventlet
                raise
            return None if error.errno in _NOTHING_YET else b""

    def _call(self, clock: _Clock, method: Any, *arguments: Any) -> Any:
        """Call a method of the socket, within the time that is left."""
        left = clock.left()
        # setting it costs a system call: better up to 40 ms late, and never early
        if not 0 <= self._timeout - left < 0.04:
            self._timeout = left + 0.02
            self.sock.settimeout(self._timeout)
        try:
            return method(*arguments)
        except socket.timeout:
            clock.left()  # raises when the time is up
            raise

    def receive(self) -> bytes:
        """The next bytes, b"" at the end. Raises OSError after `abort`."""
        self._is_waiting = True
        try:
            if self._is_aborted:
                raise OSError("the connection was closed")
            raw: bytes = self._call(self.clock, self.sock.recv, _READ_SIZE)
            return raw
        finally:
            self._is_waiting = False
            if self._is_aborted:
                self.close()

    def abort(self) -> None:
        """Close at once. A thread that waits in `receive` is woken and closes by itself:
        the descriptor's number could be another socket's by the time it wakes."""
        self._is_aborted = True
        sock = self.sock
        if (
            sock and self._owner == os.getpid()
        ):  # not in a child: it is its parent's too
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is not connected any more
        if not self._is_waiting:
            self.close()

    def is_usable(self) -> bool:
        """Young, this process's, and with nothing to read, which would be its end."""
        is_old = time.monotonic() - self.idle_since > IDLE_SECONDS
        if is_old or self._owner != os.getpid():
            return False
        if not hasattr(select, "poll"):  # Windows, or eventlet took it away
            return self._receive_now() is None
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)


# --- routes and idle connections ---
# The opener's handler: which way an origin is reached, and the connections between uses.

_LOOPBACK = "localhost 127.0.0.0/8 0.0.0.0 ::1"  # reached without a proxy


class _Route:
    """Where the requests for one origin go, to its host or to a proxy, and the idle
    connections that lead there."""

    def __init__(self, scheme: str, authority: str, proxies: Mapping[str, str]) -> None:
        parts = urllib.parse.urlsplit(f"{scheme}://{authority}")
        self.tls = scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = f"{host}:{self.port}"
        self.dial = (self.host, self.port)  # no host: a proxy that cannot be used
        self.idle: list[_Connection] = []  # the one used last is the last
        self.proxy = ""  # as messages show it
        self.login: dict[str, str] = {}
        proxy = proxies.get(scheme) or proxies.get("all")
        exempt = f"{_LOOPBACK},{proxies.get('no', '')}".lower().replace(",", " ")
        if (
            proxy
            and not any(map(self._matches, exempt.split()))
            and not urllib.request.proxy_bypass(self.host)  # macOS's and Windows's own
        ):
            self._use_proxy(proxy if "://" in proxy else "http://" + proxy)

    def pop_idle(self) -> _Connection | None:
        try:
            return self.idle.pop()
        except IndexError:  # another thread may have been quicker than any check
            return None

    def _matches(self, entry: str) -> bool:
        """Whether an entry of NO_PROXY names this host: `*`, an address or a network, or a
        name, which stands for its subdomains too; names may have a port."""
        suffix = "." + entry.lstrip("*.")
        is_name = f".{self.host}".endswith(suffix)
        if entry == "*" or is_name or f".{self.authority}".endswith(suffix):
            return True
        import ipaddress

        try:
            network = ipaddress.ip_network(entry.strip("[]"), strict=False)
            return ipaddress.ip_address(self.host) in network
        except ValueError:
            return False

    def _use_proxy(self, url: str) -> None:
        self.proxy = re.sub("//.*@", "//", url)
        self.dial = ("", 0)
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme == "http":
                self.dial = (parts.hostname or "", parts.port or 80)
        except ValueError:
            return
        if parts.username:
            pair = f"{parts.username}:{parts.password or ''}"
            token = base64.b64encode(urllib.parse.unquote_to_bytes(pair))
            login = _Secret("Basic " + token.decode("ascii"))
            self.login = {"Proxy-authorization": login}


class _Transport(urllib.request.BaseHandler):
    """The opener's handler: idle connections, routes, and the TLS context of a client."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        self.closed = False
        self._context = ssl_context
        proxies = urllib.request.getproxies()
        self._proxies = {name: _Secret(url) for name, url in proxies.items()}
        self._routes: dict[tuple[str, str], _Route] = {}

    def __del__(self) -> None:
        self.close()

    def add_parent(self, parent: Any) -> None:
        """Not to know the opener lets both be freed at once."""

    def http_open(self, request: _TimedRequest) -> _Reply:
        """The reply to a request, its head read."""
        route = self.route(request)
        while True:
            kept = self._pop_usable(route)
            connection = kept or _Connection(self, route)
            try:
                return connection.exchange(request)
            except BaseException:
                connection.close()
                if not (kept and connection.is_stale):
                    raise

    https_open = http_open

    def route(self, request: urllib.request.Request) -> _Route:
        key = (request.type, request.host)
        found = self._routes.get(key)
        return found or self._routes.setdefault(key, _Route(*key, self._proxies))

    def tls_context(self) -> ssl.SSLContext:
        if not self._context:
            import ssl

            self._context = ssl.create_default_context()
            # Python 3.8 and 3.9 set it: a cut would look like an end
            self._context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
        return self._context

    def keep(self, connection: _Connection) -> None:
        """Keep a connection whose reply ended exactly."""
        idle = connection.route.idle
        if self.closed or len(idle) >= MAX_IDLE_CONNECTIONS:
            connection.close()
        else:
            connection.idle_since = time.monotonic()
            idle.append(connection)

    def _pop_usable(self, route: _Route) -> _Connection | None:
        """The idle connection that was used last, if one can be used."""
        for connection in iter(route.pop_idle, None):
            if connection.is_usable():
                return connection
            connection.close()
        return None

    def close(self) -> None:
        self.closed = True
        for route in list(self._routes.values()):
            for connection in iter(route.pop_idle, None):
                connection.close()


# --- replies ---
# Received bytes -> the head and the body of a reply, by HTTP's own rules: a body is whole
# when its framing says so, never because the connection ended first. What is cut, corrupt
# or endless raises OSError or HTTPException, in bounded time and memory, and with nothing
# in the message that the server wrote.

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) +([0-9]{3})(?![^ \n])")
_HEADER = re.compile(r"\n([^\s:\0]+):([^\r\n\0]*)(?![^\n])")
_FOLD = re.compile(r"\n[ \t]+")
_LENGTH = re.compile(r"([0-9]{1,18})(?:, \1)*")  # the same one may come twice
_FIRST_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
_NEXT_CHUNK = re.compile(rb"\r?\n" + _FIRST_CHUNK.pattern)
_TRAILERS_END = re.compile(rb"(?:\A|\n)\r?\n")
_MAX_HEAD = 65536  # bytes of a response's head, of a chunk's head, of trailers
_MAX_INTERIM = 10  # 1xx replies before the real one
_FINISH_SECONDS = 0.1  # for the end of a body behind [DONE], to keep the connection


class _BadReply(http.client.HTTPException):
    """A reply that HTTP does not allow, or that is too large."""


class _Source:
    """The bytes of a reply, as `receive` delivers them."""

    def __init__(self, receive: Callable[[], bytes], buffer: bytes) -> None:
        self.receive = receive
        self.buffer = buffer  # received and not read yet

    def grow(self) -> None:
        if len(self.buffer) > _MAX_HEAD:
            raise _BadReply("an endless head, chunk head or trailer")
        raw = self.receive()
        if not raw:
            raise http.client.RemoteDisconnected("the server closed in mid-reply")
        self.buffer += raw

    def read_until(self, end: re.Pattern[bytes]) -> bytes:
        while True:
            found = end.search(self.buffer)
            if found:
                raw = self.buffer[: found.start()]
                self.buffer = self.buffer[found.end() :]
                return raw
            self.grow()


def _parse_head(head: str) -> tuple[str, int, dict[str, str]]:
    """HTTP's minor version, the status, and the headers by their lower-case names."""
    text = _FOLD.sub(" ", head.replace("\r\n", "\n"))
    status, lines = _STATUS_LINE.match(text), _HEADER.findall(text)
    if not status:
        raise _BadReply("not an HTTP/1 reply: is it an HTTP server?")
    if len(lines) != text.count("\n"):
        raise _BadReply("a malformed header line")
    headers: dict[str, str] = {}
    for name, value in lines:
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return status[1], int(status[2]), headers


def _read_to_the_end(source: _Source) -> Iterator[bytes]:
    """A body that ends with the connection."""
    if source.buffer:
        yield source.buffer
    yield from iter(source.receive, b"")


def _read_length(source: _Source, left: int) -> Iterator[bytes]:
    """A body of Content-Length bytes."""
    while left:
        if not source.buffer:
            source.grow()
        raw, source.buffer = source.buffer[:left], source.buffer[left:]
        left -= len(raw)
        yield raw


def _read_chunked(source: _Source) -> Iterator[bytes]:
    """A body in chunks, each behind its size: the data of all that are there at once."""
    form, left, is_last = _FIRST_CHUNK, 0, False
    while True:
        raw, at, pieces = source.buffer, 0, []
        while at < len(raw) and not is_last:
            if not left:
                head = form.match(raw, at)
                if not head:
                    break
                at, form = head.end(), _NEXT_CHUNK
                left = int(head[1], 16)
                is_last = not left
            pieces.append(raw[at : at + left])
            at += len(pieces[-1])
            left -= len(pieces[-1])
        source.buffer = raw[at:]
        data = b"".join(pieces)
        if data:
            yield data
        if is_last:
            break
        if b"\n" in source.buffer[2:]:
            raise _BadReply("a corrupt chunk")
        source.grow()
    source.read_until(_TRAILERS_END)


def _read_body(
    source: _Source, status: int, headers: dict[str, str]
) -> Iterator[bytes]:
    """The body in pieces, to its exact end. Raises where it is cut."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if status in (204, 304):
        return iter(())
    if coding is not None:
        if coding.lower() != "chunked":
            raise _BadReply("a transfer coding that was not asked for")
        return _read_chunked(source)
    if length is None:
        return _read_to_the_end(source)
    size = _LENGTH.fullmatch(length)
    if not size:
        raise _BadReply("a Content-Length that is not one number")
    return _read_length(source, int(size[1]))


class _Reply:
    """One reply: its head, which is read at once, and its body piece by piece."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._is_over = False
        self._source = source = _Source(connection.receive, connection.early)
        for _ in range(_MAX_INTERIM):
            head = source.read_until(_HEAD_END).decode("latin-1")
            version, self.status, headers = _parse_head(head)
            if self.status >= 200:
                break
        else:
            raise _BadReply("too many interim (1xx) replies")
        self.headers = Headers(headers)
        self._body = _read_body(source, self.status, headers)
        self._is_reusable = (
            version == "1"
            and "close" not in headers.get("connection", "").lower()
            and ("content-length" in headers) != ("transfer-encoding" in headers)
            and self.status < 500  # uvicorn closes behind one, silently
            and not connection.early
        )

    def abort(self) -> None:
        """Close the connection, unless the body's end has let it go."""
        if not self._is_over:
            self._is_over = True
            self._connection.abort()

    def read_next(self) -> bytes:
        """A stream's next bytes, b"" at its end. The timeout limits each wait."""
        self._connection.clock.restart("read")
        return self._read_some()

    def read(self, limit: int) -> bytes:
        """The whole body. Raises where it is larger."""
        pieces = []
        for raw in iter(self._read_some, b""):
            pieces.append(raw)
            limit -= len(raw)
            if limit < 0:
                raise _BadReply("a body larger than MAX_REPLY_BYTES")
        return b"".join(pieces)

    def read_error(self) -> bytes:
        """What comes of an error's body: its status is known, so it need not be whole."""
        return self._read_rest(MAX_ERROR_BYTES)

    def finish(self) -> None:
        """The answer is whole: keep the connection if the body's end is there too."""
        if not self._is_over:  # or the connection may be another request's by now
            self._connection.clock = _Clock(_FINISH_SECONDS)
            self._read_rest(0)

    def _read_rest(self, limit: int) -> bytes:
        body = bytearray()
        try:
            for raw in iter(self._read_some, b""):
                body += raw
                if len(body) > limit:
                    break
        except (OSError, http.client.HTTPException) as error:
            if _is_foreign_timeout(error):
                raise
        finally:
            self.abort()
        return bytes(body[:limit])

    def _read_some(self) -> bytes:
        """The next bytes of the body; at its end, keep or close the connection."""
        if self._is_over:
            return b""
        raw = next(self._body, b"")
        if not raw:
            self._is_over = True
            if self._is_reusable and not self._source.buffer:
                self._connection.transport.keep(self._connection)
            else:
                self._connection.close()
        return raw


# --- command line ---
# `python lightllm_client.py "question"`. The key comes from the environment only: all
# users of a machine see its command lines. The answer goes to stdout, all else to stderr.
# The exit status is 0, 1 for an error, 130 after Ctrl-C.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal has every letter
            stream.reconfigure(errors="replace")
    options = _options(arguments)
    try:
        client = LightLLMClient(base_url=options.base_url, timeout=options.timeout)
        with client:
            return _check(client, options) if options.check else _ask(client, options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # or the flush at exit would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OpenAIError, ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


def _options(arguments: Sequence[str] | None) -> Any:
    import argparse

    about = "Ask a LightLLM server. The key is read from LIGHTLLM_API_KEY."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("prompt", nargs="?", help="the question; none or - reads it from stdin")
    add("--system", help="a system message")
    add("--image", action="append", default=[], metavar="PATH", help="repeatable")
    add("--model", help="default: the first that the server lists")
    add("--base-url", help="default: LIGHTLLM_BASE_URL, or http://localhost:8000")
    add("--temperature", type=float, default=NOT_GIVEN)
    add("--max-tokens", type=int, default=NOT_GIVEN)
    add("--timeout", type=float, default=DEFAULT_TIMEOUT, help="seconds")
    add("--no-stream", action="store_true", help="print the answer when it is whole")
    add("--json", action="store_true", help="print the whole completion as JSON")
    add("--check", action="store_true", help="tell what the server is, how to use it")
    add("--version", action="version", version=f"{__version__} sha256 {_digest()}")
    options = parser.parse_args(arguments)
    if options.prompt in (None, "-") and not options.check:
        if options.prompt is None and sys.stdin.isatty():
            parser.error("a prompt is needed")
        options.prompt = sys.stdin.read()
    return options


def _digest() -> str:
    """The beginning of this file's sha256, whichever line ends a checkout gave it."""
    import hashlib

    with open(__file__, "rb") as file:
        return hashlib.sha256(file.read().replace(b"\r\n", b"\n")).hexdigest()[:16]


def _ask(client: LightLLMClient, options: Any) -> int:
    content: Any = options.prompt
    if options.image:
        import pathlib

        urls = [pathlib.Path(path).absolute().as_uri() for path in options.image]
        content = [{"type": "image_url", "image_url": url} for url in urls]
        content.append({"type": "text", "text": options.prompt})
    messages = [{"role": "user", "content": content}]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    request: Any = {"model": options.model or _served(client), "messages": messages}
    request["temperature"] = options.temperature
    request["max_tokens"] = options.max_tokens
    if options.json or options.no_stream:
        answer = client.chat.completions.create(**request)
        message = answer.choices[0].message
        if not options.json:
            _show_reasoning(message.reasoning)
        print(answer.to_json() if options.json else message.content or "")
        return 0
    with client.chat.completions.create(**request, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                _show_reasoning(choice.delta.reasoning)
                print(choice.delta.content or "", end="", flush=True)
    print()
    return 0


def _served(client: LightLLMClient) -> str:
    try:
        return client.models.list().data[0].id
    except (APIStatusError, APIResponseValidationError, IndexError):
        return "default"


def _show_reasoning(text: str | None) -> None:
    if text:
        dims = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        text = f"\033[2m{text}\033[0m" if dims else text
        print(text, end="", file=sys.stderr, flush=True)


def _check(client: LightLLMClient, options: Any) -> int:
    """Tell in a few lines whether the server works, and how to use it."""
    health = client.health()
    print(f"server: {'ready' if health else 'NOT ready'}: {health.reason}")
    if not health:
        return 1
    model, parser = options.model, None
    try:
        served = client.models.list().data[0]
        model = model or served.id
        length = served.get("max_model_len") or "an unknown number of"
        print(f"model: {served.id}, {length} tokens of context")
    except (APIStatusError, APIResponseValidationError, IndexError):
        print("model: not told (LightLLM before April 2026); pass --model if need be")
    try:
        parser = client.get("/get_server_info").get("tool_call_parser")
    except (APIStatusError, APIResponseValidationError, AttributeError):
        pass  # builds of 2025 do not tell
    mode = "server' or 'prompt" if parser else "prompt"
    print(f"tools: parser {parser or 'unknown or none'}: use tool_mode='{mode}'")
    begun = time.monotonic()
    question: Any = [{"role": "user", "content": "Say yes."}]
    model = model or "default"
    client.chat.completions.create(model=model, messages=question, max_tokens=1)
    print(f"round trip: {time.monotonic() - begun:.3f} s for one token")
    return 0


# --- licence ---
# MIT License
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this
# software and associated documentation files (the "Software"), to deal in the Software
# without restriction, including without limitation the rights to use, copy, modify,
# merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following
# conditions:
#
# The above copyright notice and this permission notice shall be included in all copies
# or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
# INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR
# PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE
# LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT
# OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR
# OTHER DEALINGS IN THE SOFTWARE.

if __name__ == "__main__":
    sys.exit(main())
