# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The lightllm_client authors
"""A synchronous, OpenAI-compatible client for LightLLM servers, in one file.

    from lightllm_client import LightLLMClient

    client = LightLLMClient(base_url="http://localhost:8000")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    response = client.chat.completions.create(model="default", messages=messages)
    print(response.choices[0].message.content)

Copy this file into your repository under any name. It needs Python 3.8 or newer, and
Pillow only to make or resize images. Threads may share a client, and it survives a fork.
What stands above the line "the fold" is for you; below it is the machinery.
`python lightllm_client.py --help` tells how to ask a server from the command line."""

from __future__ import annotations

import base64
import copy
import datetime
import errno
import functools
import http.client
import io
import itertools
import json
import math
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
from collections import namedtuple
from operator import itemgetter, methodcaller

TYPE_CHECKING = False  # checkers take this name for true; importing typing takes time
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, Generic, Literal, Never, Required, Self, TypeVar, overload

    from typing_extensions import TypedDict, Unpack

    _Answer = TypeVar("_Answer")
    _Calls = list["_Call"]
    _Found = tuple[_Calls, int]
    _Pattern = re.Pattern[str]
    _Token = tuple[str, int]
    _Json = dict[str, Any]
    _JsonList = list[_Json]
    _List = list[Any]
    _Reason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
    _StrDict = dict[str, str]
    _Pieces = Iterator[bytes]
else:
    _Answer, _Json = None, dict

    class Generic:
        def __class_getitem__(cls, answer):
            return cls

    class TypedDict:
        def __init_subclass__(cls, total=True):
            pass

    def overload(function):
        return function


__version__ = "1.1.0"

__all__ = [
    "DEFAULT_MAX_RETRIES", "DEFAULT_TIMEOUT", "NOT_GIVEN", "APIConnectionError",
    "APIError", "APIResponseValidationError", "APIStatusError", "APITimeoutError",
    "AsyncAzureOpenAI", "AsyncOpenAI", "AuthenticationError", "AzureOpenAI",
    "BadRequestError", "BaseModel", "ChatCompletion", "ChatCompletionChunk",
    "ChatCompletionMessage", "Client", "Completion", "ConflictError",
    "ContentFilterFinishReasonError", "InternalServerError", "LengthFinishReasonError",
    "LightLLMClient", "NotFoundError", "NotGiven", "Omit", "OpenAI", "OpenAIError",
    "PermissionDeniedError", "RateLimitError", "Stream", "Timeout",
    "UnprocessableEntityError", "not_given", "omit", "run_tool",
]  # fmt: skip

# --- settings ---
# Limits and defaults, with units. Set a limit in the module before the first request:
# `lightllm_client.MAX_IMAGE_BYTES = 50 << 20`. What clients differ in is their argument.

DEFAULT_TIMEOUT = 600.0  # seconds, for one attempt
DEFAULT_MAX_RETRIES = 2  # attempts after the first one
MAX_IMAGE_BYTES = 20 << 20  # of one image file
MAX_REPLY_BYTES = 256 << 20  # of one plain reply
MAX_ERROR_BYTES = 8 << 20  # of an error reply: a 422 sends the request's images back
MAX_EVENT_BYTES = 8 << 20  # of one server-sent event
MAX_IDLE_CONNECTIONS = 100  # kept open by one client between requests, to one origin
IDLE_SECONDS = 8.0  # for which one is kept usable: LightLLM closes it after 10


class NotGiven:
    """The type of NOT_GIVEN: "use the default", where None means "do not send it"."""

    def __bool__(self) -> Literal[False]:
        return False

    def __repr__(self) -> str:
        return "NOT_GIVEN"


class Omit(NotGiven):
    """The type of `omit`: like NOT_GIVEN; as a header's value it removes the header."""


class DefaultInt(int):
    """A default that can be told from the same number given by a caller."""

    is_default = True


class Timeout:
    """Limits in seconds for the phases of one attempt; None waits for ever. `connect`
    is for TCP and TLS, `write` for sending, `read` for a plain reply, or for a stream's
    next bytes; `pool` is openai's: nothing here waits for a pool."""

    def __init__(self, timeout: float | None = None, **phases: float | None) -> None:
        limits = [phases.pop(n, timeout) for n in ("connect", "read", "write", "pool")]
        self.connect, self.read, self.write, self.pool = limits
        if phases:
            raise TypeError(f"Timeout() takes connect, read, write, pool, got {phases}")

    def __repr__(self) -> str:
        return f"Timeout(connect={self.connect}, read={self.read}, write={self.write})"


NOT_GIVEN = not_given = NotGiven()
omit = Omit()
DEFAULT_MAX_TOKENS = DefaultInt(10000)

if TYPE_CHECKING:  # what an option may be
    _NotSent = NotGiven | None
    _BoolOption = bool | _NotSent
    _FloatOption = float | _NotSent
    _IntOption = int | _NotSent
    _StrOption = str | _NotSent
    _StopOption = Sequence[str] | _StrOption
    _TimeoutOption = Timeout | _FloatOption
    _ListOption = Iterable[Any] | _NotSent
    _MappingOption = Mapping[str, Any] | _NotSent
    _NoStream = Literal[False] | None

# --- errors ---
# openai's names. A message says what was asked of whom, what came back and what to try.
# No error shows a key, and all survive pickle.

Request = namedtuple("Request", "method url")  # what was asked


class Headers(_Json):
    """Response headers: lower-case names, read in any case; repeats joined by ", "."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name.lower())

    def __contains__(self, name: Any) -> bool:
        return self.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that header, read in any case, or the default."""
        return super().get(name.lower(), default)


class Response:
    """One HTTP reply. `with_raw_response` returns it; the content of a stream is b""."""

    content = b""
    retries_taken = 0
    is_closed = True
    _seconds = 0.0
    _parsed: Any = None

    def __init__(self, request: Request, status_code: int, headers: Headers) -> None:
        self.request = request
        self.method, self.url = request
        self.status_code = status_code
        self.headers = headers

    @property
    def request_id(self) -> Any:
        """The server's x-request-id, or None."""
        return self.headers.get("x-request-id")

    @property
    def text(self) -> str:
        """The content as UTF-8, also under another charset; no byte order mark."""
        return self.content.decode("utf-8", "replace").lstrip("\ufeff")

    @property
    def elapsed(self) -> Any:
        """A timedelta from the request to the last byte, or to the first of a stream."""
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
    the text and the finished calls so far, and the finish_reason if it had come."""

    message = ""

    def __init__(self, message: str = "", request: Any = None, *, body: Any = None):
        self.message = message or self.message
        super().__init__(self.message)
        self.request = request
        self.body = body
        self.partial: ChatCompletion | Completion | None = None
        facts = body if isinstance(body, dict) else {}
        code = facts.get("code")
        self.code = None if code is None else str(code)
        self.param, self.type = facts.get("param"), facts.get("type")

    def __reduce__(self) -> Any:
        return Exception.__new__, (type(self), *self.args), self.__dict__


class APIConnectionError(APIError):
    """No complete answer: the connection failed or broke. `__cause__` says why."""

    message = "Connection error."


class APITimeoutError(APIConnectionError):
    """No complete answer within `timeout`. Catch it before APIConnectionError."""

    message = "Request timed out."


class APIResponseValidationError(APIError, ValueError):
    """A status of 2xx with a body that was not asked for: HTML, cut JSON, ..."""

    def __init__(self, response: Response, body: Any, *, message: str) -> None:
        super().__init__(message, response.request, body=body)
        self.response = response
        self.status_code = response.status_code


class APIStatusError(APIError):
    """A status other than 2xx: `.status_code`, `.response`, `.request_id`."""

    def __init__(self, message: str, *, response: Response, body: Any = None) -> None:
        super().__init__(message, response.request, body=body)
        self.response = response
        self.status_code = response.status_code
        self.request_id = response.request_id


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


ContentFilterFinishReasonError = LengthFinishReasonError

_STATUS_ERRORS = {
    400: BadRequestError, 401: AuthenticationError, 403: PermissionDeniedError,
    404: NotFoundError, 409: ConflictError, 422: UnprocessableEntityError,
    429: RateLimitError, 500: InternalServerError,
}  # fmt: skip
_HINTS = {  # what to try, by the status or by the type of what broke a connection
    400: "change what it names",
    401: "check api_key",
    403: "check api_key",
    404: "check base_url, or this LightLLM build lacks the route",
    405: "check base_url: is that a LightLLM server?",
    407: "put the proxy's user and password into HTTP_PROXY",
    409: "try again",
    413: "send less: smaller images (max_image_side=), fewer messages",
    417: "check the parameters of the request",
    422: "this LightLLM build takes another type there",
    429: "the server is busy: wait, or raise max_retries",
    500: "bad or too long: lower max_tokens (10000 unless given), or see the server's log",
    502: "does the server behind this gateway run?",
    503: "the server is busy or starting: wait, then try again",
    504: "the gateway waits no longer: stream long answers, or lower max_tokens",
    "ConnectionRefusedError": "is a LightLLM server listening there?",
    "ConnectionResetError": "see the log of the server or of a gateway before it",
    "RemoteDisconnected": "see the log of the server or of a gateway before it",
    "SSLCertVerificationError": "see SSL_CERT_FILE and ssl_context=",
    "SSLError": "does that port speak https?",
    "_ClockTimeout": "raise timeout=, or stream long answers",
    "gaierror": "check the host name",
}

# --- answers ---
# Dicts, and so JSON, with openai's fields as attributes. A declared field that the server
# left out reads as None; what only the server knows is kept. No value is checked.


class BaseModel(_Json):
    """A JSON object with its fields as attributes."""

    _fields: Any = ()
    _nested: Any = ()  # pairs of a field and what makes its objects
    _undeclared: Any = ()  # more names that read as None
    _unset: Any = ()  # keys that are there without being sent
    _request_id: str | None = None

    def __init_subclass__(cls, **nested: Any) -> None:
        """As in `class Choice(BaseModel, message=Message)`."""
        cls._nested += tuple((n, kind.model_validate) for n, kind in nested.items())
        has_own = cls.__getitem__ != _Json.__getitem__  # which itemgetter would call
        for name in cls.__annotations__:
            if name[0] != "_":
                cls._fields += (name,)
                read: Any = methodcaller("get", name) if has_own else itemgetter(name)
                setattr(cls, name, property(read, doc=""))

    def __init__(self, *args: Any, **fields: Any) -> None:
        twin = self.model_validate(dict(*args, **fields))
        self.update(twin)
        self._unset = twin._unset

    @classmethod
    def model_validate(cls, data: _Json) -> Self:
        """The object for plain data, nested objects included; nothing is checked."""
        model = cls.__new__(cls)  # takes half the time of cls(data)
        _Json.update(model, data)  # as does this of model.update(data)
        for name, validate in cls._nested:
            value = data.get(name)
            if value is None:
                continue
            if type(value) is dict:
                model[name] = validate(value)
            elif type(value) is list:
                model[name] = [validate(v) if type(v) is dict else v for v in value]
        return model

    def __missing__(self, name: str) -> None:
        if name not in self._fields and name not in self._undeclared:
            raise KeyError(name)

    if not TYPE_CHECKING:  # so that checkers report a misspelt field

        def __getattr__(self, name):
            try:
                return self[name]
            except KeyError:
                problem = f"{type(self).__name__} has no field {name!r}"
                raise AttributeError(problem) from None

        @property
        def __dict__(self):
            return {name: self.get(name) for name in (*self._fields, *self)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self[name] = value

    def __bool__(self) -> bool:
        return True  # as in openai, where an empty delta is true as well

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"

    def __getstate__(self) -> Any:
        """What copy and pickle set besides the items: (None, attributes)."""
        return None, {"_request_id": self._request_id, "_unset": self._unset}

    @property
    def model_extra(self) -> _Json:
        """The fields that only the server knows."""
        return {n: value for n, value in self.items() if n not in self._fields}

    @property
    def model_fields_set(self) -> set[str]:
        """The names of the declared fields that the server sent."""
        return {*self._fields} & self.to_dict().keys()

    def model_copy(self, *, update: Any = None, deep: bool = False) -> Self:
        """A copy, with the fields of `update` in it."""
        twin = copy.deepcopy(self) if deep else copy.copy(self)
        twin.update(update or {})
        return twin

    def model_dump(
        self, *, include: Any = None, exclude: Any = None, **options: Any
    ) -> _Json:
        """Plain dicts and lists; declared fields that the server left out are None.
        `include` and `exclude` are sets of names. `exclude_none` and `exclude_unset` go
        for nested objects too; pydantic's other options are ignored."""
        if {str, dict} & {type(include), type(exclude)}:
            raise TypeError("include and exclude must be sets of names")
        fields = vars(self)
        sent = self.keys() - self._unset if options.get("exclude_unset") else fields
        nulls: Any = () if options.get("exclude_none") else sent  # None stays in these
        return {
            name: _to_plain(value, options)
            for name, value in fields.items()
            if name in (fields if include is None else include)
            and name not in (exclude or ())
            and (value is not None or name in nulls)
        }

    def model_dump_json(self: Any, *, indent: int | None = None, **options: Any) -> str:
        """`model_dump(...)` as JSON text."""
        plain = self.model_dump(**options)
        marks = (",", ":") if indent is None else None
        return json.dumps(plain, ensure_ascii=False, indent=indent, separators=marks)

    def to_dict(self, **options: Any) -> _Json:
        """`model_dump` of the fields that the server sent."""
        return self.model_dump(**{"exclude_unset": True, **options})

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON text, with `indent=2`."""
        return self.model_dump_json(**{"exclude_unset": True, "indent": 2, **options})

    __delattr__ = _Json.__delitem__
    copy = model_copy
    dict = model_dump
    json = model_dump_json


def _to_plain(value: Any, options: _Json) -> Any:
    """A copy without classes. The options are model_dump's."""
    if hasattr(value, "model_dump"):
        return value.model_dump(**options)
    if isinstance(value, list):
        return [_to_plain(item, options) for item in value]
    return copy.deepcopy(value) if isinstance(value, dict) else value


# --- answer objects ---
# openai's names. The annotations are the declared fields; a class's keywords say which of
# them hold objects, and of which class. What LightLLM does not send is Any.


class Details(BaseModel):
    """What openai nests and LightLLM seldom sends: any field reads, as None if unset."""

    def __missing__(self, name: str) -> None:
        if name.startswith("__"):
            raise KeyError(name)


Details._nested = [(n, Details.model_validate) for n in ("content", "top_logprobs")]
_TWINS = {"reasoning": "reasoning_content", "reasoning_content": "reasoning"}
_ALWAYS = dict.fromkeys(("role", "content", "tool_calls"))  # the usage guide reads them


class Function(BaseModel):
    """The function that a call names, and its arguments as JSON text."""

    name: str
    arguments: str


class ChatCompletionMessageToolCall(BaseModel, function=Function):
    """A call of a message."""

    id: str
    type: str
    function: Function


class _Message(BaseModel, function_call=Function):
    """`reasoning` and `reasoning_content` both read what was sent under either name."""

    content: str | None
    refusal: Any
    function_call: Any
    audio: Any
    if TYPE_CHECKING:
        reasoning: str | None
        reasoning_content: str | None

    def __getitem__(self, name: str) -> Any:
        twin = _TWINS.get(name, "")
        if twin in self and self.get(name) is None:
            name = twin
        return super().__getitem__(name)


class ChatCompletionMessage(_Message, tool_calls=ChatCompletionMessageToolCall):
    """`content` is the model's text with the tags of its calls."""

    role: str
    tool_calls: list[ChatCompletionMessageToolCall] | None
    annotations: Any
    _undeclared = _TWINS

    @classmethod
    def model_validate(cls, data: _Json) -> Self:
        """As in BaseModel; what the usage guide reads is there, if only as None."""
        message = super().model_validate({**_ALWAYS, **data})
        message._unset = _ALWAYS.keys() - data
        return message


class _Choice(BaseModel, logprobs=Details):
    index: int
    stop_reason: Any
    logprobs: Any
    token_ids: Any


class Choice(_Choice, message=ChatCompletionMessage):
    """One of the `n` answers."""

    message: ChatCompletionMessage
    finish_reason: _Reason


class CompletionUsage(
    BaseModel, completion_tokens_details=Details, prompt_tokens_details=Details
):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: Any
    prompt_tokens_details: Any


class _Completion(BaseModel, usage=CompletionUsage):
    id: str
    created: int
    model: str
    object: str
    usage: CompletionUsage | None
    system_fingerprint: Any
    service_tier: Any
    moderation: Any
    prompt_token_ids: Any


class ChatCompletion(_Completion, choices=Choice):
    """A whole answer: `choices[0].message`."""

    choices: list[Choice]
    metadata: Any


class ChoiceDeltaToolCall(ChatCompletionMessageToolCall):
    """A streamed call: whole, in one delta."""

    index: int


class ChoiceDelta(_Message, tool_calls=ChoiceDeltaToolCall):
    """A piece of a message. Without reasoning it has neither of its two names."""

    role: str | None
    tool_calls: list[ChoiceDeltaToolCall] | None


class ChunkChoice(_Choice, delta=ChoiceDelta):
    """A piece of one of the `n` answers; the last one has the `finish_reason`."""

    delta: ChoiceDelta
    finish_reason: _Reason | None


class ChatCompletionChunk(_Completion, choices=ChunkChoice):
    """A piece of an answer; the one that carries the usage has no choices."""

    choices: list[ChunkChoice]
    obfuscation: Any


class CompletionChoice(_Choice):
    """A continuation of the prompt: `text`."""

    text: str
    finish_reason: _Reason


class Completion(_Completion, choices=CompletionChoice):
    """The continuation of a prompt, or a piece of it: `choices[0].text`."""

    choices: list[CompletionChoice]


class Model(BaseModel):
    """A served model. `max_model_len` is its context in tokens."""

    id: str
    created: int
    object: str
    owned_by: str
    max_model_len: int
    shutdown_date: Any


class ModelList:
    """A page of models: iterable, all of them in `.data`."""

    def __init__(self, page: _Json) -> None:
        self.data = [Model(model) for model in page["data"]]

    def __iter__(self) -> Iterator[Model]:
        return iter(self.data)

    def has_next_page(self) -> bool:
        """False: the list is one page."""
        return False

    def model_dump(self, **options: Any) -> _Json:
        """{"object": "list", "data": [...]}; options as in BaseModel."""
        return {"object": "list", "data": _to_plain(self.data, options)}

    model_dump_json = BaseModel.model_dump_json


class Health(namedtuple("Health", "ready reason")):
    """Whether a server is ready: true or false, with `.reason`."""

    def __bool__(self) -> bool:
        return bool(self.ready)


# --- client ---
# Options and namespaces. Nothing is connected before the first request. Copies made by
# `with_options` share the connections; pickled clients open their own.


class LightLLMClient:
    """A client for one LightLLM server, used as openai's.

    `api_key`: str, a callable that returns one for each request, None (LIGHTLLM_API_KEY
    or OPENAI_API_KEY, if set), "" (none). `base_url`: http(s)://host:port, with or
    without /v1; None takes LIGHTLLM_BASE_URL, OPENAI_BASE_URL or http://localhost:8000.
    `timeout`: seconds for one attempt (of a stream: for the wait for its next bytes),
    None for ever, or a Timeout; Python cannot interrupt the lookup of a host name.
    `max_retries`: after connection errors, timeouts, 408, 409, 429 and >= 500.
    `tool_mode`: "server" sends tools to the server; "prompt" writes them into a copy of
    the system message and reads the calls here, on every build. `api`: "generate" is the
    native API, also chosen by a base_url that ends in /generate; there `render(messages,
    tools) -> str` makes another prompt than ChatML, and `image_tag` is an image in it.
    `image_root`: None lets messages name any file, a folder only files in it, False none.
    `max_image_side`, in pixels: larger images are scaled down, with Pillow. `ssl_context`
    replaces the verifying default. What cannot work raises ValueError or TypeError."""

    __slots__ = ("__dict__", "__weakref__", "chat", "completions", "models")

    def __init__(
        self,
        api_key: str | Callable[[], str] | None = None,
        base_url: _StrOption = None,
        timeout: _TimeoutOption = DEFAULT_TIMEOUT,
        *,
        max_retries: int = DEFAULT_MAX_RETRIES,
        default_headers: _MappingOption = None,
        default_query: _MappingOption = None,
        organization: _StrOption = None,
        project: _StrOption = None,
        tool_mode: Literal["server", "prompt"] = "server",
        api: Literal["chat", "generate"] | None = None,
        render: Callable[..., str] | None = None,
        image_tag: str = "<|vision_start|><|vision_end|>",
        image_root: str | os.PathLike[str] | Literal[False] | None = None,
        max_image_side: int | None = None,
        ssl_context: ssl.SSLContext | None = None,
        **unknown: Never,
    ) -> None:
        api_key = _hide(_environment("API_KEY") if api_key is None else api_key)
        self.default_headers = default_headers = _hide(default_headers or {})
        for name in unknown:
            raise _unknown_name(name, _OPTION_NAMES, unknown)
        self.api_key = _check_key(api_key)
        self.base_url = base_url or _environment("BASE_URL") or "http://localhost:8000"
        self.timeout = _check_timeout(timeout, DEFAULT_TIMEOUT)
        if not isinstance(max_retries, int):
            raise TypeError(f"max_retries must be an int, got {max_retries!r}")
        if max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, got {max_retries}")
        self.max_retries = max_retries
        self.default_query = dict(default_query or {})
        self.organization = organization
        self.project = project
        self.tool_mode = _check_choice("tool_mode", tool_mode, ("server", "prompt"))
        self.api = _check_choice("api", api, (None, "chat", "generate"))
        self.render = render
        self.image_tag = image_tag
        self.image_root = image_root
        self.max_image_side = max_image_side
        self.ssl_context = ssl_context
        _merge_headers({}, self.default_headers)  # refuses a bad one before a request
        self._transport = _Transport(ssl_context)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self._transport)
        self._add_namespaces(False)

    def _add_namespaces(self, raw: bool) -> Self:
        """They hold a twin: in a cycle, a dropped client would keep its sockets."""
        twin = object.__new__(type(self))
        twin.__dict__ = self.__dict__
        self.chat = Chat(twin, raw)
        self.completions = Completions(twin, raw)
        self.models = Models(twin, raw)
        return self

    @property
    def base_url(self) -> str:
        """What routes are appended to; setting it checks it and completes its /v1."""
        return self._base_url

    @base_url.setter
    def base_url(self, url: str) -> None:
        url = str(url)  # of another library's class, perhaps
        found = _BASE_URL.fullmatch(url)
        if not found or int(found["port"] or 0) > 65535:
            shown = _shown_url(url.rpartition("@")[2])  # without credentials
            what = "be ASCII http://host[:port], without credentials, query, fragment, space"
            if not url.startswith(("http://", "https://")):
                what = "start with http:// or https://"
            raise ValueError(f"base_url must {what}, got {shown!r}")
        url = url.rstrip("/")
        self._base_url = url if url.count("/") > 2 else url + "/v1"

    @property
    def beta(self) -> Self:
        """`client.beta.chat` is `client.chat`."""
        return self

    @property
    def with_raw_response(self) -> Any:
        """This client, but its calls return the Response, with `.parse()`."""
        return self.chat._client._add_namespaces(True)

    def copy(self, **changes: Any) -> Self:
        """A client with other options on the same connections. `default_headers` and
        `default_query` are added to its own, or replace them with `set_` in front."""
        changes = {name: v for name, v in changes.items() if _is_given(v)}
        _hide_secrets(changes)
        for name in ("default_headers", "default_query"):
            base = changes.pop("set_" + name, None)
            base = getattr(self, name) if base is None else base
            changes[name] = {**base, **(changes.get(name) or {})}
        try:
            twin = type(self)(**{**self._options(), **changes})
            if "ssl_context" not in changes:
                twin._transport, twin._opener = self._transport, self._opener
            return twin
        finally:
            changes.clear()  # or it would show a key under a misspelt name

    with_options = __copy__ = copy

    def _options(self) -> _Json:
        return {name: getattr(self, name) for name in _OPTION_NAMES}

    def __getstate__(self) -> _Json:
        if self.ssl_context:
            what = "a client with an ssl_context cannot be pickled"
            raise TypeError(f"{what}: make it where it is used, or set SSL_CERT_FILE")
        return self._options()

    def __setstate__(self, options: _Json) -> None:
        LightLLMClient.__init__(self, **options)  # a subclass may have another one

    def __deepcopy__(self, memo: Any) -> Self:
        return self.copy(ssl_context=self.ssl_context)  # on connections of its own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections, the copies' too; every later request fails."""
        self._transport.close()

    def is_closed(self) -> bool:
        """Whether close() was called, of this client or of one with its connections."""
        return self._transport.closed

    def get(self, path: str, **options: Any) -> Any:
        """The JSON of any server route. Options: extra_headers, extra_query, timeout."""
        return self.models._request("GET", self._join_root(path), options)

    def post(self, path: str, *, body: Any = None, **options: Any) -> Any:
        """The same for a POST: `client.post("/tokens", body={"text": "hello"})`."""
        return self.models._request("POST", self._join_root(path), options, body)

    def health(self, *, timeout: float = 5.0) -> Health:
        """Whether the server is ready. One of 2025 generates for that: 100 s at first."""
        try:
            self.copy(max_retries=0, timeout=timeout).get("/health")
        except APIError as error:
            return Health(False, error.message)
        return Health(True, f"{self.base_url} answers")

    def _join_root(self, path: str) -> str:
        path = urllib.parse.quote(path.lstrip("/"), "%/?&=:;,@+!$'()*~[]#")
        return re.sub("/(v1|generate)$", "", self._base_url) + "/" + path


class AsyncOpenAI:
    """Only a name, for code that imports it: calling it raises TypeError."""

    def __init__(self, *args: Any, **options: Any) -> None:
        what = f"{type(self).__name__} is not supported: LightLLMClient is synchronous"
        raise TypeError(f"{what}, for LightLLM; use it in threads, or install openai")


class AzureOpenAI(AsyncOpenAI):
    """Only a name, too."""


class AsyncAzureOpenAI(AsyncOpenAI):
    """Only a name, too."""


OpenAI = LightLLMClient
Client = LightLLMClient

# --- endpoints ---
# What can be asked. TypedDicts serve checkers, completion and the check of names. None is
# not sent: the server's default applies; NOT_GIVEN is the signature's. `extra_body` wins.


class _CommonOptions(TypedDict, total=False):
    extra_headers: _MappingOption
    extra_query: _MappingOption
    extra_body: _MappingOption
    timeout: _TimeoutOption
    model: Required[_StrOption]
    temperature: _FloatOption
    top_p: _FloatOption
    top_k: _IntOption
    max_tokens: _IntOption
    stop: _StopOption
    presence_penalty: _FloatOption
    frequency_penalty: _FloatOption
    repetition_penalty: _FloatOption
    do_sample: _BoolOption
    ignore_eos: _BoolOption
    logit_bias: Any
    n: _IntOption
    response_format: Any
    seed: _IntOption
    stream_options: Any
    user: _StrOption


class ChatOptions(_CommonOptions, total=False):
    """What `chat.completions.create` takes; LightLLM ignores those from `audio` on."""

    messages: Required[Iterable[Any]]
    logprobs: _BoolOption
    tools: _ListOption
    tool_mode: Literal["server", "prompt"] | NotGiven
    tool_choice: Any
    chat_template_kwargs: _MappingOption
    max_completion_tokens: _IntOption
    parallel_tool_calls: _BoolOption
    reasoning_effort: _StrOption
    separate_reasoning: _BoolOption
    stream_reasoning: _BoolOption
    top_logprobs: _IntOption
    character_settings: Any
    role_settings: Any
    audio: Any
    function_call: Any
    functions: Any
    metadata: Any
    modalities: Any
    moderation: Any
    prediction: Any
    prompt_cache_key: Any
    prompt_cache_options: Any
    prompt_cache_retention: Any
    safety_identifier: Any
    service_tier: Any
    store: Any
    verbosity: Any
    web_search_options: Any


class CompletionOptions(_CommonOptions, total=False):
    """The options of `completions.create`."""

    prompt: Required[str | Sequence[Any]]
    best_of: _IntOption
    echo: _BoolOption
    logprobs: _IntOption
    suffix: _StrOption


class _Resource:
    """A namespace of the client; with `raw`, its calls return the Response."""

    def __init__(self, client: LightLLMClient, raw: bool = False) -> None:
        self._client = client
        self._raw = raw

    @property
    def with_raw_response(self) -> Any:
        """The same calls, returning the Response, with `.parse()`."""
        return type(self)(self._client, True)

    def _request(
        self, method: str, url: str, call: _Json, body: Any = None, build: Any = None
    ) -> Any:
        """What `build` makes of the JSON reply; or the Stream, if it builds chunks."""
        _hide_secrets(call)
        exchange = _Exchange(self._client, method, url, body, call)
        if isinstance(build, _AnswerBuilder) and build.is_stream:
            source = _StreamSource(exchange, build)
            if not self._raw:
                return Stream(source)
            response = copy.copy(source.response)  # the stream must not be in a cycle
            response._parsed = Stream(source)
            return response
        response = exchange.fetch(build)
        if isinstance(response._parsed, BaseModel):
            response._parsed._request_id = response.request_id
        return response if self._raw else response._parsed


class Chat(_Resource):
    """`client.chat`, which is its own `.completions`: LightLLM has no more there."""

    @property
    def completions(self) -> Self:
        """`client.chat.completions`"""
        return self

    @overload
    def create(
        self, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> Stream[ChatCompletionChunk]: ...
    @overload
    def create(  # noqa: F811
        self, *, stream: _NoStream = ..., **options: Unpack[ChatOptions]
    ) -> ChatCompletion: ...
    @overload
    def create(  # noqa: F811
        self, *, stream: _BoolOption, **options: Unpack[ChatOptions]
    ) -> ChatCompletion | Stream[ChatCompletionChunk]: ...
    def create(  # noqa: F811
        self,
        *,
        model: _StrOption,
        messages: Iterable[Any],
        temperature: _FloatOption = 0.6,
        top_p: _FloatOption = 0.95,
        max_tokens: _IntOption = DEFAULT_MAX_TOKENS,
        stop: _StopOption = None,
        presence_penalty: _FloatOption = 1.1,
        logprobs: _BoolOption = False,
        tools: _ListOption = None,
        top_k: _IntOption = 50,
        repetition_penalty: _FloatOption = 1.0,
        stream: _BoolOption = None,
        **options: Any,
    ) -> Any:
        """A ChatCompletion, or with `stream=True` a Stream of ChatCompletionChunks.

        Defaults: temperature 0.6, top_p 0.95, top_k 50, max_tokens 10000,
        presence_penalty 1.1, repetition_penalty 1.0, logprobs False, no stop, no tools.
        Without max_tokens (None) the server's limit applies: 16 on builds of 2025.
        `messages`: {"role": str, "content": str | list of parts}, or messages of earlier
        answers. Parts: {"type": "text", "text": str}; {"type": "image_url", "image_url":
        URL | {"url": URL}} with a file://, data: or http(s):// URL or a PIL image.
        `tools`: openai's schemas, or functions. `max_completion_tokens` alone sets
        max_tokens too. The answer ends before a `stop` string. See also ChatOptions.
        Raises TypeError or ValueError for what cannot be sent, before anything is; then
        APIStatusError, APIConnectionError or APIResponseValidationError."""
        named = {
            "model": model, "temperature": temperature, "top_p": top_p, "top_k": top_k,
            "max_tokens": max_tokens, "stop": stop, "logprobs": logprobs, "stream": stream,
            "presence_penalty": presence_penalty, "repetition_penalty": repetition_penalty,
        }  # fmt: skip
        body, extra, call = _split_options(options, ChatOptions, named)
        client = self._client
        tools = _tool_list(tools)
        mode = body.pop("tool_mode", client.tool_mode)
        messages = _make_list(messages, "messages must be a list")
        if not messages:
            raise ValueError("messages must not be empty")
        body["messages"] = [_prepare_message(message, client) for message in messages]
        is_default = hasattr(body.get("max_tokens", DEFAULT_MAX_TOKENS), "is_default")
        if is_default and "max_completion_tokens" in body:
            body["max_tokens"] = body["max_completion_tokens"]
        builder = _AnswerBuilder(True, {**body, **extra}, tools)
        url = client._base_url + "/chat/completions"
        if client.api == "generate" or client._base_url.endswith("/generate"):
            url = client._join_root("generate" + "_stream" * builder.is_stream)
            head = {"id": f"gen-{next(_ids)}", "created": int(time.time())}
            builder.native = {**head, "model": body.get("model")}
            body = _native_body(body, tools, extra, client)
            return self._request("POST", url, call, body, builder)
        if _check_choice("tool_mode", mode, ("server", "prompt")) == "prompt":
            body["messages"] = _flatten_messages(body, tools)
            body["tool_choice"] = "none"  # or builds of 2025 answer 400 to calls
        elif tools:
            body["tools"] = tools
            builder.sends_tools = True
        _join_parts(body["messages"])
        return self._request("POST", url, call, {**body, **extra}, builder)


class Completions(_Resource):
    """`client.completions`: a prompt in, its continuation out: `.choices[0].text`."""

    @overload
    def create(
        self, *, stream: Literal[True], **options: Unpack[CompletionOptions]
    ) -> Stream[Completion]: ...
    @overload
    def create(  # noqa: F811
        self, *, stream: _NoStream = ..., **options: Unpack[CompletionOptions]
    ) -> Completion: ...
    @overload
    def create(  # noqa: F811
        self, *, stream: _BoolOption, **options: Unpack[CompletionOptions]
    ) -> Completion | Stream[Completion]: ...
    def create(self, *, model: Any, prompt: Any, **options: Any) -> Any:  # noqa: F811
        """A Completion, or with `stream=True` a Stream of them. `prompt`: str, list of
        str, or token ids. Defaults as in chat, and do_sample: old builds are greedy."""
        named = {"model": model, "prompt": prompt, "do_sample": True, "logprobs": None}
        body, extra, call = _split_options(options, CompletionOptions, named)
        body.update(extra)
        if "n" in body:
            body.setdefault("best_of", body["n"])  # LightLLM wants them equal
        url = self._client.base_url + "/completions"
        return self._request("POST", url, call, body, _AnswerBuilder(False, body))


class Models(_Resource):
    """`client.models`: LightLLM serves one model, and lists it from April 2026 on."""

    def list(self, **options: Any) -> ModelList:
        """The served models. Raises NotFoundError where a build has no list."""
        url = self._client.base_url + "/models"
        models: ModelList = self._request("GET", url, options, build=ModelList)
        return models

    def retrieve(self, model: str, **options: Any) -> Model:
        """The served model of that id. Raises NotFoundError where there is none."""
        if not model:
            raise ValueError("models.retrieve() needs the id of a model")
        url = self._client.base_url + "/models"
        response = self.with_raw_response._request("GET", url, options, build=ModelList)
        served = {found.id: found for found in response.parse()}
        if model not in served:
            message = f"no model {model!r} at {response.url}, only {[*served]}"
            raise NotFoundError(message, response=response)
        response._parsed = served[model]
        response._parsed._request_id = response.request_id
        found: Model = response if self._raw else response._parsed
        return found


# --- streams ---
# A stream is whole after [DONE], or a finish_reason and a clean end of the body; else it
# raises. One that is left is closed, not drained: that makes LightLLM stop generating.


class Stream(Generic[_Answer]):
    """The chunks of one answer, each as soon as its bytes are there.
    Raises APIConnectionError where the answer is cut off, APIError with the server's
    words where it reports an error; `error.partial` is what had come. `.response` has
    status and headers. `with`, `close()` and dropping it end it at once."""

    def __init__(self, source: _StreamSource) -> None:
        self.response = source.response
        self._source = source
        self._chunks: Iterator[_Answer] = source.chunks()  # holds the source, not us

    def __iter__(self) -> Iterator[_Answer]:
        return self

    def __next__(self) -> _Answer:
        for chunk in self._chunks:
            return chunk
        self._source.raise_error()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection now; a loop in another thread gets an error at once."""
        self._source.close()

    __del__ = close

    @overload
    def get_final_completion(self: Stream[ChatCompletionChunk]) -> ChatCompletion: ...
    @overload
    def get_final_completion(self: Stream[Completion]) -> Completion: ...  # noqa: F811
    def get_final_completion(self) -> Any:  # noqa: F811
        """The whole answer, after reading what is left; raises as the loop does."""
        for _ in self:
            pass
        return self._source.builder.build_completion()


# --- functions as tools ---
# `tools=[search, visit]`: a function's schema comes from its signature and docstring. Types:
# str, int, float, bool, list, dict, Optional, Union, Literal, Enum; others: TypeError.


def run_tool(call: Any, tools: Iterable[Any]) -> str:
    """The text for the `tool` message that answers a call: what the function of that name
    returns, a str as it is, else as JSON. Of an unknown name, arguments that do not
    fit, a TypeError or ValueError the text tells the model; other errors are raised."""
    import typing

    asked = _prepare_call(call)["function"]
    name, text = asked["name"], asked["arguments"]
    functions = {_tool_name(tool): tool for tool in tools if callable(tool)}
    function = functions.get(name)
    if function is None:
        return f"Error: there is no tool {name!r}, only {', '.join(functions)}."
    try:
        arguments = _parse_json(text)
        for key, kind in typing.get_type_hints(function).items():
            if key in arguments and hasattr(kind, "__members__"):  # an Enum
                arguments[key] = kind(arguments[key])
        result = function(**arguments)
        if isinstance(result, str):
            return result
        return json.dumps(result, ensure_ascii=False, default=str)
    except (TypeError, ValueError) as error:
        return f"Error: {name}({text}) failed: {error}"


# ======================================================================================
# the fold: below is the machinery, nothing that a user imports
# A request: `create` (endpoints) checks names (options), makes the messages sendable
#   (messages and images), turns functions into tools (tool schemas), and for tool_mode
#   "prompt" and the native API writes the prompt (prompts). Attempts, retries and errors
#   (requests, request parts) go over a socket (routes and idle connections, connections).
# Its answer: framing (replies), then one JSON text (JSON) or events (server-sent events,
#   stream source). Stop strings are cut off (stop strings), calls are found in the text
#   (tool-call tags, arguments in tags, calls in JSON) or made by the server (server-made
#   calls), ids and reasons are mended (putting answers right). Out come a ChatCompletion
#   (answers) or a Stream of chunks (streams).
# ======================================================================================

# --- options ---
# What the client and its calls take: checks, and what a misspelt name should have been.
# Keys are hidden as soon as they are there: tools print the variables of tracebacks.


class _Secret(str):
    """A str whose repr shows nothing."""

    def __repr__(self) -> str:
        return "'***'"


def _is_given(value: Any) -> bool:
    """By name: openai has such marks too, and importlib.reload() makes new ones."""
    return type(value).__name__ not in ("NotGiven", "Omit")


def _hide(value: Any) -> Any:
    """A key or headers whose repr shows nothing."""
    if hasattr(value, "items"):
        return {name: _hide(item) for name, item in value.items()}
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return _Secret(value) if isinstance(value, str) else value


def _hide_secrets(options: _Json) -> None:
    """In place: from here on no variable shows a key."""
    for name in _SECRET_OPTIONS.intersection(options):
        options[name] = _hide(options[name])


def _environment(name: str) -> str:
    found = [os.environ.get(prefix + name, "") for prefix in ("LIGHTLLM_", "OPENAI_")]
    return next(filter(None, map(str.strip, found)), "")


def _unknown_name(name: str, known: Iterable[str], options: _Json) -> TypeError:
    """The error for a name in `options`, which are emptied: a misspelt one may hold a key,
    and no variable shows that."""
    import difflib

    options.clear()
    if name == "http_client":
        use = "use ssl_context=, HTTP_PROXY, SSL_CERT_FILE"
        return TypeError(f"{name} is not supported: {use}")
    if name in _OPTION_NAMES:
        where = f"client.with_options({name}=...) or LightLLMClient({name}=...)"
        return TypeError(f"{name} is an option of the client: use {where}")
    close = difflib.get_close_matches(name, known, 1)
    hint = f"it takes {sorted(known)}; what only a server knows goes into extra_body"
    hint = f"did you mean {close[0]!r}?" if close else hint
    return TypeError(f"got an unexpected keyword argument {name!r}: {hint}")


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def _check_key(key: Any) -> Any:
    """A _Secret without white space around it, or the callable that returns one."""
    if callable(key):
        return key
    if not isinstance(key, str):
        raise TypeError(f"api_key must be str or callable, got {type(key).__name__}")
    key = _Secret(key.strip())
    if re.match("https?://", key):
        raise ValueError("api_key is a URL: pass it as base_url=")
    if _UNSENDABLE.search(key):
        raise ValueError("api_key must not contain characters that no header can hold")
    return key


def _check_timeout(timeout: Any, default: Any) -> Any:
    if not _is_given(timeout):
        return default
    is_number = isinstance(timeout, (int, float))
    if timeout is None or hasattr(timeout, "connect") or (is_number and timeout > 0):
        return timeout
    raise ValueError(f"timeout must be seconds > 0, None or a Timeout, got {timeout!r}")


_BASE_URL = re.compile(
    r"(?ai)https?://(\[[\w:.%]+]|[\w-]{1,63}(\.[\w-]{1,63})*\.?)(:(?P<port>\d+))?"
    r'(/[!"$->@-~]*)?'  # all but spaces, ? and #
)
_OPTION_NAMES = {*LightLLMClient.__init__.__annotations__} - {"unknown", "return"}
_SECRET_OPTIONS = {"api_key", "default_headers", "set_default_headers", "extra_headers"}
_CALL_OPTIONS = ("extra_headers", "extra_query", "timeout")
_COMMON_NAMES = {"stream", *_CommonOptions.__annotations__}


def _drop_none(fields: _Json) -> _Json:
    return {name: value for name, value in fields.items() if value is not None}


_DEFAULTS = _drop_none(vars(Chat)["create"].__kwdefaults__)


def _split_options(options: _Json, kind: Any, named: _Json) -> tuple[_Json, ...]:
    """The body of a request, what is merged into it, and the options of the call itself."""
    _hide_secrets(options)
    for name in options:
        if name not in _COMMON_NAMES and name not in kind.__annotations__:
            known = _COMMON_NAMES.union(kind.__annotations__)
            raise _unknown_name(name, known, options)
    extra = options.pop("extra_body", None) or {}
    call = {name: options.pop(name) for name in _CALL_OPTIONS if name in options}
    body: _Json = {**_DEFAULTS}
    for name, value in itertools.chain(named.items(), options.items()):
        if value is None:
            body.pop(name, None)
        elif value or _is_given(value):  # a mark leaves what stands before it
            body[name] = value
    if "stream" in body:
        body["stream"] = bool(body["stream"])
    return body, extra, call


# --- messages and images ---
# What a caller wrote -> what every LightLLM build accepts, in new dicts. Image files are
# read here: the server sees other disks. http(s) URLs are not: theirs is another network.

_IMAGE_TYPE = re.compile(  # told by the first bytes, not by the name
    rb"(?s)(?P<jpeg>\xff\xd8\xff)|(?P<png>\x89PNG)|(?P<gif>GIF8)|(?P<bmp>BM)"
    rb"|(?P<webp>RIFF.{4}WEBP)"
)
_IMAGE_URL = re.compile("(?i)(https?:|data:)|file:(/|///+|//localhost/+)(?!/)")


def _make_list(value: Any, rule: str) -> _List:
    if isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{rule}, got {type(value).__name__}")
    return list(value)


def _as_list(value: Any) -> _List:
    return value if isinstance(value, list) else [value]


def _as_dict(item: Any, what: str) -> _Json:
    """A copy of a dict, or of what was set of an object of ours or openai's."""
    if hasattr(item, "model_dump"):
        item = _drop_none(item.model_dump(exclude_unset=True))
    if not isinstance(item, dict):
        raise TypeError(f"{what} must be a dict or an answer's part, got {item!r:.80}")
    return dict(item)


def _as_function(item: Any, what: str) -> _Json:
    """A tool or a tool call, as a dict with a dict as its function."""
    sent = _as_dict(item, what)
    sent["function"] = _as_dict(sent.get("function") or {}, what)
    if isinstance(sent["function"].get("name") or None, str):
        return sent
    form = '{"type": "function", "function": {"name": ...}}'
    raise ValueError(f"{what} must be like {form}, got {item!r:.80}")


def _prepare_message(message: Any, client: LightLLMClient) -> _Json:
    """A new dict whose content is a list of parts, each text in it a str."""
    sent = _as_dict(message, "a message")
    role = sent.get("role")
    if not isinstance(role, str) or not re.fullmatch(r"[\w-]+", role):
        raise ValueError(f"a message must have a role, got {sent!r:.80}")
    if role == "developer":
        sent["role"] = "system"  # templates ignore roles that they do not know
    content = sent.get("content")
    parts = [content or ""]
    if content is not None and not isinstance(content, str):
        content = _make_list(content, "content must be a str or a list of parts")
        parts = [_prepare_part(part, client) for part in content] or [""]
    sent["content"] = parts
    if sent.get("tool_calls"):
        calls = sent["tool_calls"] = [_prepare_call(one) for one in sent["tool_calls"]]
        known = _parameter_schemas(calls)
        if any(_read_calls(part, known) for part in parts if isinstance(part, str)):
            del sent["tool_calls"]  # the content still holds them: once is enough
    return sent


def _prepare_call(call: Any) -> _Json:
    """LightLLM silently drops a call whose arguments are not JSON text."""
    sent = {**_as_function(call, "a tool call"), "type": "function"}
    arguments = sent["function"].get("arguments") or "{}"
    is_text = isinstance(arguments, str)
    sent["function"]["arguments"] = arguments if is_text else _dump_json(arguments)
    return sent


def _prepare_part(part: Any, client: LightLLMClient) -> Any:
    """The text of a text part; what is sent for another."""
    if isinstance(part, str):
        return part
    part = _as_dict(part, "a part of content")
    if part.get("type") == "text":
        return _prepare_part(part.get("text") or "", client)
    if part.get("type") == "image_url":
        image = part.get("image_url")
        image = image if isinstance(image, dict) else {"url": image}
        part["image_url"] = {**image, "url": _image_url(image.get("url"), client)}
    return part


def _join_parts(messages: _JsonList) -> None:
    """Make contents str where all parts are: templates of text models fail on lists."""
    for message in messages:
        parts = message["content"]
        try:
            message["content"] = "\n".join(parts)
        except TypeError:
            message["content"] = [
                {"type": "text", "text": part} if isinstance(part, str) else part
                for part in parts
            ]


def _image_url(image: Any, client: LightLLMClient) -> str:
    """A data: URL, or the http(s) URL as it is. ValueError names the image and why."""
    side = client.max_image_side
    try:
        if hasattr(image, "save"):
            return _png_url(image, side)
        url = _read_url(str(image), client.image_root)
        return _shrink(url, side) if side and url.startswith("data:") else url
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {image!r:.200}: {error}") from error


def _read_url(url: str, root: Any) -> str:
    """What is sent for an image's URL. `root` is the client's image_root."""
    found = _IMAGE_URL.match(url)
    if not found:
        raise ValueError("not a PIL image or URL; write a local path as file:///path")
    if found[1]:
        return "".join(url.split()) if url[0] in "dD" else url  # base64 comes in lines
    path = os.path.realpath(urllib.request.url2pathname("/" + url[found.end() :]))
    is_inside = root and path.startswith(os.path.join(os.path.realpath(root), ""))
    if not is_inside and root is not None:
        raise ValueError("not allowed by image_root")
    nowait = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait for its writer
    with open(path, "rb", opener=lambda to, flags: os.open(to, flags | nowait)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")  # a device may never end
        raw = file.read(MAX_IMAGE_BYTES + 1)
    if len(raw) > MAX_IMAGE_BYTES:
        raise ValueError(f"larger than {MAX_IMAGE_BYTES} bytes")
    kind = _IMAGE_TYPE.match(raw)
    if not kind:
        raise ValueError("not a JPEG, PNG, WebP, GIF or BMP image")
    return f"data:image/{kind.lastgroup};base64,{base64.b64encode(raw).decode()}"


def _png_url(image: Any, side: int | None) -> str:
    """A PIL image, upright as its EXIF data say, with no side longer than `side`."""
    if hasattr(image, "getexif"):
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)  # a copy
        if side:
            image.thumbnail((side, side))
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="PNG")
    except OSError:  # a mode that PNG lacks, such as CMYK
        image.convert("RGB").save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shrink(url: str, side: int) -> str:
    """The data: URL as it is, or a PNG's if a side is longer than `side` pixels."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("max_image_side needs Pillow: pip install pillow") from None
    raw = io.BytesIO(base64.b64decode(url.partition(",")[2]))
    try:
        image = Image.open(raw, formats=[*_IMAGE_TYPE.groupindex])
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    return _png_url(image, side) if max(image.size) > side else url


# --- prompts ---
# What a server's template would do, done here as those of Qwen2.5 and Qwen3 do it: the
# tool block, calls and results as text, ChatML for the native API; and that API's replies.

_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
%s
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>%s"""
_TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"
_SPECIAL_TOKEN = re.compile(r"<\|(?=[^|<>\s]{1,40}\|>)")

_NATIVE_FIELDS = ("inputs", "multimodal_params")  # beside its parameters
# Options that the native API takes by name; and those it gets otherwise or can lack.
_PASSED = """do_sample frequency_penalty ignore_eos n presence_penalty
    repetition_penalty seed temperature top_k top_p"""
_LEFT_OUT = """max_completion_tokens max_tokens messages metadata model
    parallel_tool_calls prediction prompt_cache_key prompt_cache_options
    prompt_cache_retention response_format safety_identifier service_tier stop store
    stream stream_options stream_reasoning tool_choice user"""


def _select_tools(tools: _JsonList, body: _Json) -> tuple[_JsonList, str]:
    """The tools that tool_choice leaves, and the sentence for what it asks."""
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        choice = _as_function(choice, "tool_choice")["function"]["name"]
        offered = {tool["function"]["name"]: tool for tool in tools}
        _check_choice("tool_choice", choice, tuple(offered))
        return [offered[choice]], f"\n\nYou must call the function {choice} now."
    _check_choice("tool_choice", choice, (None, "auto", "none", "required"))
    if choice == "required":
        return tools, "\n\nYou must call at least one of these functions now."
    return ([] if choice == "none" else tools), ""


def _flatten_messages(body: _Json, tools: _JsonList) -> _JsonList:
    """Messages whose contents say it all: the tools, the calls and their results."""
    flat: _JsonList = []
    results: _List = []  # the turn of neighbouring results, as in Qwen's templates
    for message in body["messages"]:
        parts = message["content"]
        if message["role"] in ("tool", "function"):
            if not re.match(r"\s*<tool_response>", str(parts[0])):
                parts = ["<tool_response>", *parts, "</tool_response>"]
            if not results:
                flat.append({"role": "user", "content": results})
            results += parts
        else:
            results = []
            calls = map(_call_text, message.pop("tool_calls", None) or ())
            flat.append({**message, "content": [*filter(None, parts), *calls]})
    shown, wish = _select_tools(tools, body)
    if shown:
        block = _TOOLS % ("\n".join(map(_dump_json, shown)), wish)
        if flat[0]["role"] == "system":
            flat[0]["content"] += ["\n" + block]
        else:
            flat.insert(0, {"role": "system", "content": [block]})
    return flat


def _call_text(call: _Json) -> str:
    function = call["function"]
    name, arguments = _dump_json(function["name"]), function["arguments"]
    if len(_split_objects(arguments)) != 1:
        arguments = _dump_json(arguments)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def _native_body(
    body: _Json, tools: _JsonList, extra: _Json, client: LightLLMClient
) -> _Json:
    """The native API's request for a chat request, with `extra` merged into it."""
    images: _JsonList = []
    messages = body["messages"]
    if not client.render:
        messages = _flatten_messages(body, tools)
    for message in messages:
        message["content"] = _prompt_text(message["content"], images, client.image_tag)
        for call in message.get("tool_calls") or ():
            found = _split_objects(call["function"]["arguments"])
            if len(found) == 1:  # templates of Hugging Face want objects
                call["function"]["arguments"] = found[0][0]
    if client.render:
        prompt = client.render(messages, _select_tools(tools, body)[0] or None)
    else:
        prompt = "".join(map(_TURN.format_map, messages)) + "<|im_start|>assistant\n"
    media = {"multimodal_params": {"images": images}} if images else {}
    extra = {**extra}
    named = extra.pop("parameters", None) or {}
    outer = {name: extra.pop(name) for name in _NATIVE_FIELDS if name in extra}
    parameters = {**_native_parameters(body), **extra, **named}
    return {"inputs": prompt, **media, **outer, "parameters": parameters}


def _native_parameters(body: _Json) -> _Json:
    known = f"{_PASSED} {_LEFT_OUT}".split()
    refused = [name for name in body if body[name] and name not in known]
    refused += ["n in streams"] * bool(body.get("stream") and body.get("n", 1) != 1)
    parameters = {
        "do_sample": True,  # builds of 2025 are greedy without it
        "best_of": body.get("n"),
        "max_new_tokens": body.get("max_completion_tokens", body.get("max_tokens")),
        "stop_sequences": _stop_strings(body.get("stop")),
        **{name: body[name] for name in _PASSED.split() if name in body},
    }
    wanted = _as_dict(body.get("response_format", {}), "response_format")
    schema = (wanted.get("json_schema") or wanted).get("schema")  # as in builds of 2025
    if schema:
        parameters["guided_json"] = _dump_request(schema)
    elif wanted.get("type") == "json_object":
        parameters["guided_grammar"] = "json"
    elif wanted.get("type", "text") != "text":
        refused.append(f"response_format {wanted!r:.80}")
    if refused:
        raise ValueError(f"the native API has no {', '.join(refused)}: leave it out")
    return _drop_none(parameters)


def _prompt_text(parts: _List, images: _JsonList, tag: str) -> str:
    """The text of a content, with tags for images; no special token forges a turn."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(_SPECIAL_TOKEN.sub("<| ", part))
        elif part.get("type") == "image_url":
            _, mark, data = part["image_url"]["url"].rpartition(";base64,")
            images.append({"type": "base64" if mark else "url", "data": data})
            texts.append(tag)
        else:
            raise ValueError(f"not text or an image: {part!r:.80}; use extra_body")
    return "\n".join(texts)


def _native_reply(data: _Json, head: _Json) -> _Json:
    """A reply of /generate, or an event of /generate_stream, as the chat API has it."""
    place, kind, token = "message", "chat.completion", data.get("token")
    if isinstance(token, dict):
        place, kind = "delta", "chat.completion.chunk"
        data = {**data, **token, "generated_text": [token.get("text")]}
    texts = [t for t in _as_list(data.get("generated_text")) if t is not None]
    reasons = _as_list(data.get("finish_reason")) * len(texts)  # one for all
    chat: _Json = {**head, "object": kind, "choices": []}
    for index, (text, reason) in enumerate(zip(texts, reasons)):
        turn = {"role": "assistant", "content": text}
        chat["choices"].append({"index": index, place: turn, "finish_reason": reason})
    counts = [data.get("prompt_tokens"), *_as_list(data.get("count_output_tokens"))]
    if any(reasons) and set(map(type, counts)) == {int}:
        usage = {"prompt_tokens": counts[0], "completion_tokens": sum(counts[1:])}
        chat["usage"] = {**usage, "total_tokens": sum(counts)}
    return chat


# --- tool schemas ---
# A Python function -> its schema, for `tools=[search, visit]`; and a value in tags, which
# is text -> what else its schema says it may be.

_KINDS = {
    dict: "object", list: "array", str: "string", bool: "boolean", int: "integer",
    float: "number", type(None): "null",
}  # fmt: skip
_PARAMETER = (  # x: ..., x (int): ..., - x: ..., numpy's x : int, :param int x: ...
    r"(?:\n *(?:Arg|Param)\w*:? *)?\n[-*\s]*(?:[:@](?:param|arg)\w* (?:[^:\n]* )?)?"
    r"(%s)(?: : .*(?=\n {4})|(?: ?\(.*?\))? ?:)"
)


def _tool_list(tools: Any) -> _JsonList:
    """Schemas as they are, functions as their schemas."""
    return [
        _function_schema(tool) if callable(tool) else _as_function(tool, "a tool")
        for tool in _make_list(tools or (), "tools must be a list")
    ]


def _tool_name(tool: Any) -> str:
    import inspect

    name: str = getattr(tool, "__name__", "")
    is_async = inspect.iscoroutinefunction(tool) or inspect.isasyncgenfunction(tool)
    if is_async or not name.isidentifier():
        raise TypeError(f"a tool must be a def with a name, not async, got {tool!r}")
    return name


def _function_schema(function: Any) -> _Json:
    import inspect
    import typing

    name, hints = _tool_name(function), typing.get_type_hints(function)
    parameters, properties = inspect.signature(function).parameters, {}
    described = _parse_docstring(inspect.getdoc(function) or "", "|".join(parameters))
    for key, one in parameters.items():
        if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            raise TypeError(f"{name}: {one} cannot be passed by name")
        properties[key] = _type_schema(hints.get(key), f"{name}: {one}")
        if key in described:
            properties[key]["description"] = described[key]
    required = [key for key, one in parameters.items() if one.default is one.empty]
    accepted = {"type": "object", "properties": properties, "required": required}
    schema = {"name": name, "description": described[""], "parameters": accepted}
    return {"type": "function", "function": schema}


def _parse_docstring(text: str, names: str) -> _StrDict:
    """What it says of each parameter and, as "", before them. `names`: a|b|c."""
    head, *fields = re.split(_PARAMETER % names, "\n" + text)
    described = {"": head.strip()}
    for name, told in zip(fields[::2], fields[1::2]):
        told = re.split(r"\n\s*(?:\n|:|@|(?:Returns|Raises|Yields):)", told)[0]
        described.setdefault(name, " ".join(told.split()))
    return described


def _type_schema(kind: Any, where: str) -> _Json:
    import typing

    origin = typing.get_origin(kind) or kind
    inner = [one for one in typing.get_args(kind) if one is not type(None)]
    if hasattr(kind, "__members__"):  # an Enum
        origin, inner = typing.Literal, [member.value for member in kind]
    if origin in _KINDS:
        part = "items" if origin is list else "additionalProperties"
        inside = {part: _type_schema(inner[-1], where)} if inner else {}
        return {"type": _KINDS[origin], **inside}
    if origin is typing.Literal and len(set(map(type, inner))) == 1:
        return {**_type_schema(type(inner[0]), where), "enum": inner}
    if origin is typing.Union or getattr(origin, "__name__", "") == "UnionType":
        schemas = [_type_schema(one, where) for one in inner]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    raise TypeError(f"{where}: no schema for the type {kind!r}; write the dict by hand")


def _parameter_schemas(tools: Iterable[_Json]) -> _Json:
    """The schema of the parameters of each offered tool, by its name."""
    schemas: _Json = {}
    for tool in tools:
        schema = tool["function"].get("parameters")
        if not isinstance(schema, dict):  # qwen-agent's form may require what it likes
            schema = {"required": bool(schema)}
        schemas[tool["function"]["name"]] = schema
    return schemas


def _convert_value(text: str, schema: Any, root: _Json) -> Any:
    """A value by its schema: text, unless another type is wanted and fits."""
    kinds = _find_kinds(schema, root)
    is_text = "string" in kinds
    if is_text:
        kinds &= {"object", "array", "null"}
    elif "number" in kinds:
        kinds.add("integer")
    if not kinds:
        return text
    try:
        written = text if is_text else _LENIENT_TOKEN.sub(_rewrite_token, text)
        value = _parse_json(written, _STRICT)
    except ValueError:
        return text
    return value if _KINDS[type(value)] in kinds else text


def _find_kinds(schema: Any, root: _Json) -> set[str]:
    """The JSON types that a schema allows, as far as it says."""
    options = [schema]
    for option in options:  # grows by what each of them allows
        if isinstance(option, dict):
            for name in ("type", "anyOf", "oneOf", "allOf"):
                options += _as_list(option.get(name))
            target: Any = root if "$ref" in option else None
            for name in str(option.get("$ref")).split("/")[1:]:  # of "#/$defs/Name"
                target = target.get(name) if isinstance(target, dict) else None
            if target not in options:  # a schema may refer to itself
                options.append(target)
    return {option for option in options if isinstance(option, str)}


# --- putting answers right ---
# What servers of all builds send -> one kind of answer. Every call arrives whole or not at
# all, read from the text or made by the server; a plain reply goes the way of a stream of
# one piece. A call that was announced and did not come whole is an error.

_ids = itertools.count(time.time_ns() // 1000)  # other than those of an earlier run
_WAY_OUT = "pass tool_mode='prompt', which loses no call on any LightLLM build"
_NATURAL_ENDS = ("stop", "tool_calls", "function_call", None)  # not cut off
_HEAD_FIELDS = ("id", "created", "model", "object", "system_fingerprint")
_NAMING_FIELDS = {"id", "created", "model"}  # which each answer has


class _LostCall(ValueError):
    """Args: what the answer announced and did not hold, and the answer if it is plain."""


class _ChoiceState:
    """One choice of an answer: its text, its calls, and why it ended."""

    def __init__(self, request: _Json, schemas: _Json, reads_calls: bool) -> None:
        self.reason: Any = None
        self.pending: Any = None  # a finish_reason beside a call, which more may follow
        self.problem = ""  # why the answer is not what it claims to be
        self._text, self._reasoning = io.StringIO(), io.StringIO()
        self._has_text = False
        self._calls: _JsonList = []
        self._is_plain = not request.get("stream")  # then calls stay in the text too
        self.server = _ServerCalls(schemas, self._text, self._is_plain)
        self._stop: Any = None
        self._reader: Any = None
        stops = _stop_strings(request.get("stop"))
        if stops:
            prompt: Any = request.get("prompt") if request.get("echo") else ""
            skip = len(prompt) if isinstance(prompt, str) else sys.maxsize  # of a list
            self._stop = _StopFilter(stops, skip)
        if reads_calls and request.get("tool_choice") != "none":
            self._reader = _CallReader(schemas, not self._is_plain)

    def settle(self, choice: _Json, fields: _Json, key: str) -> None:
        """Settle what came, in place: the text is `fields[key]`, calls stand beside it."""
        text, deltas = fields.get(key), _objects(fields.get("tool_calls"))
        reasoning = fields.get("reasoning") or fields.get("reasoning_content")
        if isinstance(reasoning, str):
            self._reasoning.write(reasoning)
        reason = choice.get("finish_reason")  # gateways say "" or "null" for none
        reason = None if reason == "null" else reason or None
        if reason and deltas and not self._is_plain:
            self.pending, reason = reason, None
        ending = reason or ("stop" if self._is_plain else None)
        ready = text if isinstance(text, str) else ""
        if self._stop:
            ready = self._stop.feed(ready)
            ready += self._stop.finish(ending) if ending else ""
        shown = ready
        calls: _Calls = []
        if self._reader:
            pieces = self._reader.feed(ready)
            if deltas:
                self._reader.drop_open_tag()
                if re.search("[{[]|<function=|<arg_key>", self._reader.held):
                    self.problem = "the server took a part of a call's text for a call"
            if ending:
                pieces += self._reader.finish(ending in _NATURAL_ENDS)
            calls = [piece for piece in pieces if isinstance(piece, _Call)]
            shown = "".join([piece for piece in pieces if isinstance(piece, str)])
        self._text.write(shown)
        if deltas or calls or ending:
            calls = self.server.take(deltas, calls, ending)
        given = [self._record(call) for call in calls]
        if ending:
            self._end(reason)
        if shown or isinstance(text, str):
            self._has_text = True
            fields[key] = ready if self._is_plain else shown
        if given or "tool_calls" in fields:
            fields["tool_calls"] = given or None
        choice["finish_reason"] = self.reason if ending else None

    def message(self) -> _Json:
        """The message as far as it is certain."""
        held = [part.held for part in (self._reader, self._stop) if part]
        text = "".join([self._text.getvalue(), *held])
        content = text if text or self._has_text else None
        message: _Json = {"role": "assistant", "content": content}
        if self._reasoning.tell():
            message["reasoning"] = self._reasoning.getvalue()
        return {**message, "tool_calls": self._calls or None}

    def _record(self, call: _Call) -> _Json:
        """Note a whole call; the fields that give it out."""
        index, call_id = len(self._calls), call.fields.get("id")
        if not call_id or call_id in [known["id"] for known in self._calls]:
            call_id = f"call_{index + 1}_{next(_ids)}"
        function = {**call.fields.get("function", {}), "name": call.name}
        function["arguments"] = call.arguments
        made = {**call.fields, "id": call_id, "type": "function", "function": function}
        self._calls.append(made)
        return made if self._is_plain else {"index": index, **made}

    def _end(self, reason: Any) -> None:
        """Say why it ended, and whether it is what it claims to be."""
        self._stop = self._reader = None
        if self.reason not in _NATURAL_ENDS:
            reason = self.reason  # what was cut stays cut
        if reason in _NATURAL_ENDS:
            is_empty = not (self._calls or self._text.getvalue().strip())
            if is_empty and reason in ("tool_calls", "function_call"):
                self.problem = f"finish_reason {reason!r}, but neither a call nor text"
            self.problem = self.server.lost or self.problem
            reason = "tool_calls" if self._calls else reason and "stop"
        self.reason = None if self.problem else reason


class _AnswerBuilder:
    """Builds the answer to one request from what the server sends."""

    sends_tools = False  # to the server, which then reads the calls itself
    usage: Any = None
    _has_usage = _has_null_role = False

    def __init__(self, is_chat: bool, request: _Json, tools: Any = ()) -> None:
        self.is_stream = bool(request.get("stream"))
        self.native: _Json = {}  # the head of an answer of the native API
        self.head: _Json = {}  # the fields that all chunks share
        self._is_chat = is_chat
        self._key = "content" if is_chat else "text"
        self._reply: Any = ChatCompletion if is_chat else Completion
        self._chunk: Any = ChatCompletionChunk if is_chat else Completion
        self._request = request
        self._schemas = _parameter_schemas(tools)
        self._choices: dict[int, _ChoiceState] = {}

    def __call__(self, data: Any) -> Any:
        """The answer of a plain reply. Raises where it is none, or lost a call."""
        data = _native_reply(data, self.native) if self.native else data
        choices = _objects(data["choices"])
        if not choices:
            raise ValueError("no choices")
        problem = ""
        for choice in choices:
            fields = choice["message"] if self._is_chat else choice
            calls = fields.get("tool_calls")
            has_tags = not calls and "<" in str(fields.get(self._key))  # perhaps
            is_usual = choice.get("finish_reason") in ("stop", "length")
            if calls or has_tags or self._request.get("stop") or not is_usual:
                state = _ChoiceState(self._request, self._schemas, has_tags)
                state.settle(choice, fields, self._key)
                problem = problem or state.problem
            elif "tool_calls" in fields:
                fields["tool_calls"] = None
        answer = self._reply.model_validate(data)
        if problem:
            raise _LostCall(problem, answer)
        return answer

    def build_chunk(self, data: _Json) -> Any:
        """The chunk that goes out for an event. Raises where an answer lost a call."""
        if not self.head.keys() >= _NAMING_FIELDS:
            known = {name: data[name] for name in _HEAD_FIELDS if data.get(name)}
            self.head = {**known, **self.head}
        self.usage = data.get("usage") or self.usage
        self._has_usage |= "usage" in data
        data["choices"] = _objects(data.get("choices"))
        for choice in data["choices"]:
            index = choice.get("index")
            index = index if isinstance(index, int) else 0
            fields = choice.get("delta") if self._is_chat else choice
            if not isinstance(fields, dict):
                fields = choice["delta"] = {}
            self._has_null_role |= fields.get("role", "") is None
            state = self._choices.get(index)
            if not state:
                state = _ChoiceState(self._request, self._schemas, bool(self._schemas))
                self._choices[index] = state
            state.settle(choice, fields, self._key)
            if state.problem:
                raise _LostCall(f"{state.problem}; {_WAY_OUT}")
        return self._chunk.model_validate(data)

    def build_end(self) -> Iterator[Any]:
        """The chunk that ends choices whose finish_reason did not come by itself."""
        choices = [
            {"index": index, "finish_reason": state.reason or state.pending or "stop"}
            for index, state in self._choices.items()
            if not state.reason or state.server.held
        ]
        if choices:
            yield self.build_chunk({**self.head, "choices": choices})

    def find_cut(self) -> str:
        """What is wrong with a stream that ended without [DONE], if anything is."""
        reasons = [s.reason or s.pending for s in self._choices.values()]
        what = "the stream ended without [DONE] or a finish_reason: incomplete"
        if self.sends_tools and self._has_null_role and not self._has_usage:
            what = "the text of this stream is damaged"
        elif reasons and None not in reasons:
            return ""
        elif not self.head:
            what = "the stream ended without any event"
        if self.sends_tools:
            what += "; LightLLM builds of April 2025 to March 2026 damage or cut off streams"
            what += f" of requests with tools: {_WAY_OUT}"
        return what

    def build_completion(self) -> Any:
        """The answer so far."""
        choices = []
        for index, state in sorted(self._choices.items()):
            said = state.message()
            own = {"message": said} if self._is_chat else {"text": said["content"]}
            choices.append({"index": index, **own, "finish_reason": state.reason})
        data = {**self.head, "choices": choices, "usage": self.usage}
        data["object"] = "chat.completion" if self._is_chat else "text_completion"
        return self._reply.model_validate(data)


def _objects(items: Any) -> _JsonList:
    if not items or not isinstance(items, list):
        return []
    return [item for item in items if isinstance(item, dict)]


# --- server-made calls ---
# Deltas of calls -> whole calls, each held until the next one begins or the answer ends:
# servers run them together, send them twice, cut them, or close them themselves.

_CALL_TAG = re.compile(r"<\W?tool.call|<(?:\WDSML\W)?function[=_]")


class _ServerCall:
    """A call that a server makes itself, as its deltas come."""

    name = ""
    _start = 0  # where the pieces behind its last head begin, which may be anew

    def __init__(self, index: Any) -> None:
        self.index = index
        self.fields: _Json = {"function": {}}
        self.pieces: list[str] = []  # of its arguments

    def add(self, delta: _Json, function: _Json) -> None:
        name, arguments = function.get("name"), function.get("arguments")
        if name:
            self.name = self.name or (name if isinstance(name, str) else "")
            self._start = len(self.pieces)
        if arguments not in (None, ""):
            is_text = isinstance(arguments, str)
            self.pieces.append(arguments if is_text else _dump_json(arguments))
        self.fields["function"].update(_drop_none(function))
        self.fields.update(_drop_none({**delta, "function": None, "index": None}))

    def objects(self) -> list[tuple[_Json, str]]:
        """Its arguments if it is whole; those of each where a server ran calls together."""
        text, last = "".join(self.pieces), "".join(self.pieces[self._start :])
        if not self.name.strip() or not text.rstrip().endswith("}"):
            return []
        return _split_objects(text) or _split_objects(last)


class _ServerCalls:
    """The calls that a server makes itself, each held until it is whole."""

    lost = ""  # what to say of one that did not come whole
    _last: Any = None  # the one given last, if it came in one piece

    def __init__(self, schemas: _Json, text: io.StringIO, is_plain: bool) -> None:
        self.held: list[_ServerCall] = []
        self._schemas = schemas
        self._text = text  # of the answer, which may show damage
        self._is_plain = is_plain

    def take(self, deltas: _JsonList, calls: _Calls, ending: Any) -> _Calls:
        """The calls that are certain now: the server's, then `calls`, read from the text."""
        has_begun = sum(map(self._add, deltas))
        if not (has_begun or calls or ending):
            return calls
        text = self._text.getvalue()
        is_whole = ending in _NATURAL_ENDS
        is_shown = False  # whether the text holds them, whole and not in a thought
        if self._is_plain and deltas:
            shown = _read_calls(text, self._schemas, is_whole)
            is_shown = len(shown) >= len(self.held)
        if not (is_whole or is_shown):
            del self.held[-1:]  # the server may have closed it itself
        given: _Calls = []
        kept = 0 if calls or ending else 1  # the last one may go on
        while len(self.held) > kept:
            call = self.held[0]
            objects = call.objects()
            damage = "" if is_shown else _find_damage(text, call.name)
            has_copy = len(self.held) > 1 and self.held[1].name == call.name
            if not ending and (has_copy or damage or not objects):
                break  # glm47 sends a call twice, and perhaps cuts it
            del self.held[0]
            if has_copy and not objects and self.held[0].objects():
                continue  # the copy is the call
            schema = self._schemas.get(call.name, {"required": "unknown"})
            may_be_empty = ending in _NATURAL_ENDS and not schema.get("required")
            if may_be_empty and not (objects or call.pieces):
                objects = [({}, "{}")]  # LightLLM streams "" for no arguments
            is_one = len(call.pieces) == 1
            twin = [call.fields.get("id"), call.name, objects]
            if damage or not objects:
                self.lost = f"a call of {call.name!r} did not come whole{damage}"
            elif is_one or twin != self._last:
                given += [_Call(call.name, *found, call.fields) for found in objects]
            self._last = twin if is_one and twin[0] else None
        return given + calls

    def _add(self, delta: _Json) -> bool:
        """Take a delta; return whether it begins a call."""
        function = delta.get("function")
        if isinstance(function, str) or delta.get("name"):
            function = {"name": [delta]}  # of an unknown form: it never comes whole
        function = function if isinstance(function, dict) else {}
        index, name, call_id = delta.get("index"), function.get("name"), delta.get("id")
        held = [call for call in self.held if index in (None, call.index)]
        call = held[-1] if held and not self._is_plain else _ServerCall(index)
        if name and call.name:  # a head: of this call again, or of the next one?
            is_other = call_id and call_id != call.fields.get("id", call_id)
            last = next(filter(str.strip, reversed(call.pieces)), "").rstrip()
            is_whole = last.endswith("}") and _split_objects("".join(call.pieces))
            if is_other or name != call.name or is_whole:
                call = _ServerCall(index)
        call.add(delta, function)
        is_real = name or call_id or call.pieces or self._is_plain
        begins = bool(is_real) and call not in self.held
        if begins:
            self.held.append(call)
        return begins


def _find_damage(text: str, name: str) -> str:
    """What the text of an answer says against a call that its server made."""
    *ended, rest = text.split("</think>")
    if "<think>" in rest:
        return ": it stands in a thought that does not end"
    # without <think>, which the prompt may end in, all before </think> is thought
    thoughts = "".join([part.split("<think>", 1)[-1] for part in ended])
    if name in thoughts and _CALL_TAG.search(thoughts):
        return ": it stands in a thought"
    for tag in ("arg_value", "parameter"):
        if text.count(f"</{tag}>") > text.count(f"<{tag}"):
            return f": the server cut an argument off, whose </{tag}> is in the text"
    return ""


# --- stream source ---
# The events of a reply -> the chunks of a Stream. An error is noted here, and raised by the
# Stream: the variables of these frames hold what the server wrote, a key perhaps.


class _StreamSource:
    def __init__(self, exchange: _Exchange, builder: _AnswerBuilder) -> None:
        self.builder = builder
        self.error: APIError | None = None
        self._exchange = exchange
        self._is_over = False
        self.response, self._reply = exchange.send(is_stream=True)
        self.response.is_closed = False

    def chunks(self) -> Iterator[Any]:
        decoder, builder, native = _EventDecoder(), self.builder, self.builder.native
        try:
            while not self.error:
                raw = self._reply.read_next()
                cut = "" if raw or _DONE in decoder.feed(b"\n") else builder.find_cut()
                if cut and decoder.stray:
                    body = _ErrorText(decoder.stray.decode("utf-8", "replace"))
                    raise self._exchange.event_error(self.response, body, None)
                if cut:
                    raise self._exchange.error(APIConnectionError, cut)
                for text in filter(str.strip, decoder.feed(raw)) if raw else [_DONE]:
                    self._is_over = text.startswith(_DONE)
                    if not self._is_over:
                        data = self._parse(text)
                        is_finished = bool(native and data.get("finished"))
                        data = _native_reply(data, native) if native else data
                        yield builder.build_chunk(data)
                        self._is_over = is_finished
                    if self._is_over:
                        self._reply.finish()
                        yield from builder.build_end()
                    if self._is_over or self.error:
                        return
        except OSError as cause:
            if _is_foreign_timeout(cause):
                raise
            broken = self._exchange.connection_error(cause, "the answer is incomplete")
            broken.__cause__ = cause.with_traceback(None)  # frames lead to the stream
            self._note(broken)
        except APIError as error:
            self._note(error)
        except ValueError as cause:
            self._note(self._exchange.error(APIError, str(cause)))
        finally:
            self.close()

    def close(self) -> None:
        if not self.response.is_closed:
            self._exchange.log(self.response, self.builder.usage)
        self.response.is_closed = True
        if not self._is_over:
            what = "the stream was closed before its end"
            self._note(self._exchange.error(APIConnectionError, what))
            self._reply.abort()

    def raise_error(self) -> None:
        """Raise what ended the stream, if it failed: a copy, since what was raised holds
        its frames, they the stream, and that the error: none would ever be freed."""
        if self.error:
            raise copy.copy(self.error) from self.error.__cause__

    def _parse(self, text: str) -> _Json:
        """The JSON object of an event. Raises where it is none, or reports an error."""
        try:
            data = _parse_json(text)
        except ValueError:
            data = None
        if isinstance(data, dict) and not _is_error(text, data):
            return data
        raise self._exchange.event_error(self.response, text, data)

    def _note(self, error: APIError) -> None:
        if not self.error:
            error.partial = self.builder.build_completion()
            self.error = error.with_traceback(None)


def _is_error(text: str, data: _Json) -> bool:
    """Whether an event reports an error, in any of the shapes that servers have."""
    if data.get("error") or isinstance(text, _ErrorText):
        return True
    if "choices" in data or "token" in data:
        return False
    is_named = "error" in (data.get("object"), data.get("type"))
    has_words = "message" in data or bool(_error_words(data))
    return is_named or (has_words and not data.get("usage"))


# --- tool-call tags ---
# Model text -> texts and calls; pure. A function takes the text and a position; it returns
# what it read and where that ended, or raises _NotACall with where it failed: the search
# for the next tag goes on there, so no tag in a string, a value or code is looked at again.
# _END stands behind a text that is over; without it, more may come (_Unfinished).

_END = "\ud800"  # half of a surrogate pair, which no decoded text holds
_ENDS = tuple("</tool_call>"[:size] + _END for size in (0, *range(2, 12)))
_BEGUN = tuple("<tool_call>"[:size] + _END for size in range(2, 11))
_TAGS = ("<tool_call>", "<think>", "</think>", "<function=")
_TOKENS = _TAGS + (
    "</tool_call>", "</function>", "<code>", "```", "<parameter=", "<arg_key>",
)  # fmt: skip
_TAG_PARTS = {tag[:size] for tag in _TAGS for size in range(len(tag))}
_PARTS = {token[:size] for token in _TOKENS for size in range(len(token))}
_TAG = re.compile(  # a <tool_call> only where a call may follow
    r"<tool_call>(?!\s*(?:(?:[{[]|```(?:json)?)\s*)?<[^f/])|</?think>|<function="
)
_THOUGHT_END = re.compile("</think>")
_REGION_END = re.compile("</tool_call>|</function>")
_CALL_START = re.compile(r"\s*(?:```(?:json)?\s*)?([{[]|<function=|)")
_CALL_FOLLOWER = re.compile(
    r"[\s,}]*(?:(?:```|</function>)[\s,}]*)*([{[]|<function=|</?tool_call>|<code>|)"
)
_END_TAG = re.compile(r"\s*(</tool_call>|)")
_JSON_TOKEN = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"' r"|'[^'\\]*(?:\\.[^'\\]*)*'" r"|[\[\]{}<\"']", re.DOTALL
)
_CODE_TAG = re.compile("</?code>")
_SHORT_REGION = 500  # characters: up to this, an open region is read at every piece
_READINGS = 16  # of a longer one, when a tag came that may end it; then when it doubled


class _Unfinished(Exception):
    """The text ends before it is certain what it says."""


class _NotACall(Exception):
    """Reading failed at the position `args[0]`."""


class _CallReader:
    """Takes the calls out of a text that comes in any pieces; the outcome does not depend
    on them. What may become a call is held back until that is certain."""

    def __init__(self, schemas: _Json, is_stream: bool = True) -> None:
        self._schemas = schemas
        self._is_stream = is_stream
        self._is_thinking = False
        self._expects_end = False  # a </tool_call>, though its begin was not read
        self._held, self._tail = io.StringIO(), ""
        self._due, self._readings = 0, _READINGS

    def feed(self, text: str) -> list[Any]:
        """The texts and calls that are certain now, in order."""
        self._held.write(text)
        self._tail = (self._tail + text)[-len(text) - 11 :]  # a tag may have been cut
        if _SHORT_REGION < self._held.tell() < self._due:
            if not (self._readings and _REGION_END.search(self._tail)):
                return []
            self._readings -= 1
        return self._read("") if self._is_stream else []

    def finish(self, is_end: bool = True) -> list[Any]:
        """The rest. Where the text was cut (not `is_end`), an open region is no call."""
        return [*self._read(_END if is_end else ""), self.held]

    @property
    def held(self) -> str:
        """The text that is not decided."""
        return self._held.getvalue()

    def drop_open_tag(self) -> None:
        """The server reads this call itself: drop a held <tool_call>, and its end tag."""
        if self._held.tell() < 100 and self.held.strip() == "<tool_call>":
            self._hold("")
            self._expects_end = True

    def _hold(self, text: str) -> None:
        self._held = io.StringIO()
        self._held.write(text)
        self._tail, self._readings = text[-11:], _READINGS

    def _read(self, ending: str) -> list[Any]:
        out: list[Any] = []
        held, pos = self.held, 0
        text = held + ending
        try:
            while pos < len(held):
                pos = self._read_next(text, pos, out)
        except _Unfinished:
            pass
        if pos:
            self._hold(held[pos:])
        self._due = 2 * self._held.tell()
        return out

    def _read_next(self, text: str, pos: int, out: list[Any]) -> int:
        """Read the text up to the next tag, or what that opens; return where it ends."""
        if self._expects_end:
            token, end = _take(text, pos, _END_TAG)
            self._expects_end = False
            return end if token else pos
        found = (_THOUGHT_END if self._is_thinking else _TAG).search(text, pos)
        if found:
            end = found.start()
        else:  # what may become a tag is held
            end = text.rfind("<", max(pos, len(text) - 10))
            end = end if text[end:] in _TAG_PARTS else len(text)
        if end > pos:
            out.append(text[pos:end].rstrip(_END))
            return end
        if not found:
            raise _Unfinished
        tag, end = found[0], found.end()
        if tag == "<think>" or tag == "</think>":
            if not (self._is_stream or self._is_thinking or tag == "<think>"):
                out.clear()  # the prompt ended in <think>: all before was thought
            self._is_thinking = tag == "<think>"
        else:
            try:
                read = _read_region if tag == "<tool_call>" else _read_bare_function
                calls, end = read(text, end, self._schemas)
                self._expects_end = tag == "<function="
                out += calls
                return end
            except _NotACall as failure:
                end = failure.args[0]
        out.append(text[pos:end].rstrip(_END))
        return end


def _read_calls(text: str, schemas: _Json, is_end: bool = True) -> _Calls:
    """The calls in a whole text."""
    reader = _CallReader(schemas, is_stream=False)
    out = reader.feed(text) + reader.finish(is_end) if _TAG.search(text) else []
    return [call for call in out if isinstance(call, _Call)]


def _failure(text: str, pos: int) -> Exception:
    """Why reading fails at pos: for want of more text near its end, else for what it says."""
    is_cut = len(text) - pos < 400 and not text.endswith(_END)
    return _Unfinished() if is_cut else _NotACall(pos)


def _take(text: str, pos: int, pattern: _Pattern) -> _Token:
    """What a pattern of at most 400 characters takes at pos, perhaps "", and its end."""
    found = pattern.match(text, pos)
    if not found:
        raise _failure(text, pos)
    token, end = found[1], found.end()
    if not token and text[end : end + 12] in _PARTS:
        raise _Unfinished
    return token, end


def _read_region(text: str, pos: int, schemas: _Json) -> _Found:
    """The calls behind a <tool_call>, and the end of its region."""
    calls: _Calls = []
    while True:
        token, pos = _take(text, pos, _CALL_FOLLOWER if calls else _CALL_START)
        if token in ("{", "["):
            found, pos = _read_json(text, pos - 1)
            calls += found
        elif token == "<function=" or not (token or calls):
            form = _Qwen3Coder if token else _Glm
            call, pos = _read_tagged_call(text, pos, form, schemas)
            calls.append(call)
        elif token == "<code>":
            code, pos = _read_code(text, pos)
            call = calls.pop()
            if call.values.get("code"):
                raise _NotACall(pos)
            calls.append(_Call(call.name, {**call.values, "code": code}))
        elif token == "</tool_call>" or text.startswith(_ENDS, pos):
            return calls, pos if token else len(text)
        elif token == "<tool_call>" or text.startswith(_BEGUN, pos):
            return calls, pos - len(token)
        else:
            raise _NotACall(pos)


def _read_bare_function(text: str, pos: int, schemas: _Json) -> _Found:
    """The call at a `<function=` without a <tool_call>: whole, and of an offered tool."""
    if _take(text, pos, _Qwen3Coder.name)[0] not in schemas:
        raise _NotACall(pos)
    call, pos = _read_tagged_call(text, pos, _Qwen3Coder, schemas)
    if not text.startswith("</function>", pos):
        raise _NotACall(pos)
    return [call], pos + len("</function>")


def _read_json(text: str, pos: int) -> _Found:
    """The calls in the JSON at pos, and its end: where its brackets close."""
    depth, missing = 0, ""
    for found in _JSON_TOKEN.finditer(text, pos):
        token = found[0]
        if len(token) > 1:
            continue  # a string
        if token in "\"'":
            break  # a string that does not end
        if token == "<":
            start = found.start()
            if depth != 1 or not _take(text, start, _END_TAG)[0]:
                if text[start - 1] in "\"'" and not text.startswith("</", start):
                    break  # a quote that was not escaped: this is a string's text
                raise _NotACall(start)
            missing = "}"  # just the outer brace
        depth += 1 if token in "{[" else -1
        if depth > _MAX_DEPTH:
            raise _NotACall(found.start())
        if not depth:
            end = found.end() - len(missing)
            try:
                return _parse_calls(text[pos:end] + missing), end
            except ValueError:
                raise _NotACall(end) from None
    raise _failure(text, len(text))


def _read_code(text: str, pos: int) -> _Token:
    """The code behind <code>, in which pairs of that tag may stand, and its end."""
    depth = 1
    for found in _CODE_TAG.finditer(text, pos):
        depth += 1 if found[0] == "<code>" else -1
        if not depth:
            return text[pos : found.start()].strip("\r\n"), found.end()
    raise _failure(text, len(text))


# --- arguments in tags ---
# The forms of Qwen3-Coder and GLM. A value ends at its end tag if what may follow does, or
# before a declared argument that is not set yet, or at the end of the call.

_NAME = r"""[\s"']{0,9}([^<>\s"'][^<>\n]{0,127}?)[\s"']{0,9}"""  # with quotes around
_LAST_END_TAG = re.compile(r"(?:\A|\r?\n)[ \t]*</(\w+)>\s*\Z")


class _Qwen3Coder:
    """<function=name><parameter=key>value</parameter></function>, a line each."""

    begin, end = "<parameter=", "</parameter>"
    outer, outer_end = "<function=", "</function>"
    follower = re.compile(r"\s*(<parameter=|</function>|</tool_call>|)")
    name = key = re.compile(rf"{_NAME}>(?:\r?\n)?")
    tags = re.compile(
        rf"(?P<line>\r?\n[ \t]*)?<parameter={_NAME}>"
        r"|<function=[^<>\n]{1,128}>|(?:\r?\n)?</(?:parameter|function)>"
    )


class _Glm:
    """name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>"""

    begin, end = "<arg_key>", "</arg_value>"
    outer, outer_end = "<tool_call>", "</tool_call>"
    follower = re.compile(r"\s*(<arg_key>|</tool_call>|)")
    name = re.compile(r"([\w.-]{0,128})")
    key = re.compile(_NAME + r"</arg_key>\s{0,64}<arg_value>")
    tags = re.compile(
        rf"(?P<line>(?:\r?\n)?)<arg_key>{_NAME}</arg_key>\s{{0,64}}<arg_value>"
        r"|<arg_value>|<tool_call>|</arg_value>|(?:\r?\n)?</tool_call>"
    )


def _read_tagged_call(text: str, pos: int, form: Any, schemas: _Json) -> Any:
    """The call whose name stands at pos, and where the tag behind its arguments does."""
    name, pos = _take(text, pos, form.name)
    schema = schemas.get(name, {})
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    values: _Json = {}
    while name:
        token, end = _take(text, pos, form.follower)
        pos = end - len(token)
        if token != form.begin:
            has_end = token or text.startswith(_ENDS[1:], pos)
            if has_end and (values or form is not _Glm or name in schemas):
                return _Call(name, values), pos
            break
        key, start = _take(text, end, form.key)
        unset = {one for one in properties if one not in values and one != key}
        value, pos = _read_value(text, start, form, unset)
        converted = _convert_value(value, properties.get(key), schema)
        if values.setdefault(key, converted) != converted:
            break
    raise _NotACall(pos)


def _read_value(text: str, start: int, form: Any, unset: Any) -> _Token:
    """A value, and where what follows it stands. A tag of the form that opens in it is
    data, and so is the tag that closes that. `unset`: the arguments that may follow."""
    opened: list[str] = []  # the end tags of what the value's own tags opened
    has_argument = False  # whether something like an undeclared argument began
    end = after = 0  # where it ends if its end tag is missing: unless that still comes
    for found in form.tags.finditer(text, start):
        tag, key = found[0].lstrip(), found[2]
        at = found.end() - len(tag)
        if tag[1] != "/":
            if end:
                break
            if key and (found["line"] is not None or at == start):
                if key in unset:
                    end, after = found.start(), at
                    break
                has_argument = has_argument or not opened
            opened.append(form.outer_end if tag.startswith(form.outer) else form.end)
            if len(opened) > _MAX_DEPTH:
                raise _NotACall(found.end())
        elif tag in opened:
            while opened.pop() != tag:
                pass
        else:
            token, rest = _take(text, found.end(), form.follower)
            if tag == form.end:
                if token or text.startswith(_ENDS, rest):
                    return text[start : found.start()], rest - len(token)
            elif "</tool_call>" in (tag, token) and not end:
                if has_argument:
                    raise _NotACall(found.end())
                end, after = found.start(), at
    else:
        if not end or not text.endswith(_END):
            raise _failure(text, len(text))
    return _drop_last_end_tag(text[start:end], form), after


def _drop_last_end_tag(value: str, form: Any) -> str:
    """A value without the end tag that it ends in: its own, which a tag that it mentions
    took, or a misspelt one, alone on the last line and closing nothing."""
    if value.rstrip().endswith(form.end):
        value = value.rstrip()[: -len(form.end)]
        return re.sub(r"\r?\n\Z", "", value) if form is _Qwen3Coder else value
    found = _LAST_END_TAG.search(value)
    return value[: found.start()] if found and f"<{found[1]}" not in value else value


# --- calls in JSON ---
# The text of a call -> its name and arguments: as JSON, else leniently, where only what
# stands outside of strings is rewritten. A wrong call is worse than none.

_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*(?=\{)')
_LENIENT_TOKEN = re.compile(  # strings, Python's words, commas before brackets
    r'"[^"\\]*(?:\\.[^"\\]*)*(?:(")|\Z)'
    r"|'[^'\\]*(?:\\.[^'\\]*)*(?:(')|\Z)"
    r"|\b(?:True|False|None)\b|(?<![{\[,]),(?=\s*[}\]])",
    re.DOTALL,
)
_REWRITTEN = {"True": "true", "False": "false", "None": "null", ",": ""}
_ESCAPE = re.compile(
    r'\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|U[0-9a-fA-F]{8}|\r\n|.)|"', re.DOTALL
)


class _Call(namedtuple("_Call", "name values text fields", defaults=("", {}))):
    """A whole call. `text`: its arguments as the model wrote them, where that is JSON;
    `fields`: what else a server said of a call that it made."""

    @property
    def arguments(self) -> str:
        is_kept = self.text and not re.search(r"[\0-\x1f]", self.text)
        return self.text if is_kept else _dump_json(self.values)


def _parse_calls(text: str) -> _Calls:
    """The calls of an object, or of all objects of an array. Raises ValueError."""
    try:
        data = _parse_json(text, _STRICT)
    except ValueError:
        data = _parse_json(_LENIENT_TOKEN.sub(_rewrite_token, text), _STRICT)
        text = ""  # nothing of it is kept as it was written
    calls: _Calls = []
    pos = 0
    for item in data if data and isinstance(data, list) else [data]:
        name, values = _parse_call(item)
        written = ""
        for found in _ARGUMENTS.finditer(text, pos):
            read, end = _DECODER.raw_decode(text, found.end())
            if str(read) == str(values):  # while 1 == 1.0 == True
                written, pos = text[found.end() : end], end
                break
        calls.append(_Call(name, values, written))
    return calls


def _parse_call(item: Any) -> tuple[str, _Json]:
    """The name and the arguments of the call that an object is. Raises ValueError."""
    item = item if isinstance(item, dict) else {}
    name = item.get("name")
    written = [item[key] for key in ("arguments", "parameters") if key in item]
    values: Any = next((one for one in written if one not in (None, "", {})), {})
    if isinstance(values, str):
        values = _parse_json(values.strip() or "{}", _STRICT)
    # else there may be arguments beside the name: it would be another call without them
    is_plain = written or item.keys() <= {"name", "type", "id"}
    if name and isinstance(name, str) and isinstance(values, dict) and is_plain:
        return name, values
    raise ValueError("not a call")


def _rewrite_token(found: re.Match[str]) -> str:
    """JSON as models and Python write it -> JSON; no string changes its meaning."""
    if found[1] or found[2]:
        return '"' + _ESCAPE.sub(_rewrite_escape, found[0][1:-1]) + '"'
    return _REWRITTEN.get(found[0], found[0])  # a string that does not end stays


def _rewrite_escape(found: re.Match[str]) -> str:
    """Python's escapes -> their characters; backslashes of none are doubled, not lost."""
    escaped = found[1]
    if escaped is None:
        return r"\""
    if escaped in ("'", "\n", "\r\n"):  # behind a backslash, a line's end is none
        return str(escaped.strip())
    if escaped[0] in "xU" and escaped[1:]:
        return json.dumps(chr(int(escaped[1:], 16)))[1:-1]
    is_json = escaped[1:] or escaped in '"\\/bfnrt'
    return found[0] if is_json else "\\" + found[0]


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


def _parse_float(text: str) -> float:
    """A float. Raises ValueError for NaN and infinity, which are not JSON."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not JSON")
    return number


_STRICT = json.JSONDecoder(
    parse_float=_parse_float, parse_constant=_parse_float, strict=False
)


def _parse_json(text: str, decoder: json.JSONDecoder = _DECODER) -> Any:
    """JSON, with U+FFFD for half surrogate pairs, which cannot be printed. ValueError."""
    if "\\" in text and ("\\ud" in text or "\\uD" in text):
        text = _HALF_PAIR.sub(lambda found: found[1] or r"\ufffd", text)
    text = text.strip(" \t\n\r")
    try:
        if len(text) > _MAX_DEPTH:
            _check_depth(text)
        data, end = decoder.raw_decode(text)
    except RecursionError:
        raise ValueError("JSON of too many levels") from None
    if end < len(text):
        raise json.JSONDecodeError("more than one JSON value", text, end)
    return data


def _check_depth(text: str) -> None:
    """Raises RecursionError for levels that a thread's small stack may not hold."""
    depth = 0
    if text.replace("[", "{").count("{") > _MAX_DEPTH:
        for found in _BRACKET.finditer(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth > _MAX_DEPTH:
                raise RecursionError


def _split_objects(text: str) -> list[tuple[_Json, str]]:
    """JSON objects in a row, each with its text; none where there is anything else."""
    found: list[tuple[_Json, str]] = []
    text, pos = text.strip(), 0
    try:
        _check_depth(text)
        while text[pos : pos + 1] == "{":
            end = _DECODER.raw_decode(text, pos)[1]
            found.append((_parse_json(text[pos:end], _STRICT), text[pos:end]))
            pos = end
            while text[pos : pos + 1].isspace():
                pos += 1
    except (ValueError, RecursionError):
        return []
    return found if pos == len(text) else []


# --- server-sent events ---
# Bytes, cut anywhere and looked at once -> the data of events, by the WHATWG rules; pure.
# Only CR, LF and CRLF end a line: str.splitlines would split model text at U+2028.

_DONE = "[DONE]"


class _ErrorText(str):
    """The data of an event whose name is "error"."""


class _EventDecoder:
    _after_cr = False
    _is_error = False  # whether the event that has not ended is named "error"
    _size = 0  # bytes since the last event
    _is_first = True
    stray = b""  # JSON that stands where events should: an error's, perhaps

    def __init__(self) -> None:
        self._line = bytearray()  # that has not ended
        self._data: list[bytes] = []  # the data lines of the event that has not ended

    def feed(self, raw: bytes) -> list[str]:
        """The data of the events that these bytes end. ValueError: one is too large."""
        if self._after_cr and raw.startswith(b"\n"):
            raw = raw[1:]
        self._after_cr = raw.endswith(b"\r")
        if b"\r" in raw:
            raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        whole, end, rest = raw.rpartition(b"\n\n")
        if end and not (self._is_first or self._data or self._is_error):
            text = (self._line + whole).decode("utf-8", "replace")
            events = text[6:].split("\n\ndata: ")
            if text[:6] == "data: " and all(events) and "\n" not in "".join(events):
                self._line.clear()  # as most are: whole, and of one line each
                return self._read_lines(rest, events)
        return self._read_lines(raw, [])

    def _read_lines(self, raw: bytes, events: list[str]) -> list[str]:
        *lines, rest = raw.split(b"\n")
        if lines:
            lines[0] = bytes(self._line) + lines[0]
            self._line.clear()
            if self._is_first:
                lines[0] = re.sub(rb"\A\xef\xbb\xbf", b"", lines[0])
                self._is_first = False
        self._line += rest
        data = self._data
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value[1:] if value.startswith(b" ") else value)
            elif name == b"event":
                self._is_error = value.strip() == b"error"
            elif line[:1] in (b"{", b"[") or (self.stray and line[:1] != b":"):
                self.stray = (self.stray + line)[:_MAX_HEAD]
            if not line or data == [b"[DONE]"]:  # need not wait for the empty line
                text = b"\n".join(data).decode("utf-8", "replace")
                if text:
                    events.append(_ErrorText(text) if self._is_error else text)
                data.clear()
                self._is_error = False
        self._size = self._size + len(raw) if data and not events else len(self._line)
        if self._size > MAX_EVENT_BYTES and not events:  # those go out first
            raise ValueError("an event larger than MAX_EVENT_BYTES")
        return events


# --- stop strings ---
# Text -> the text before a stop string; pure. What may begin one is held back, so that
# the outcome does not depend on the cuts.


def _stop_strings(stop: Any) -> list[str]:
    stops = stop if isinstance(stop, (list, tuple)) else [stop]
    return [text for text in stops if isinstance(text, str) and text]


class _StopFilter:
    """Text up to the first stop string behind an echoed prompt of `skip` characters."""

    def __init__(self, stops: list[str], skip: int = 0) -> None:
        self._stops = stops
        self._longest = max(map(len, stops))
        self._pattern = re.compile("|".join(map(re.escape, stops)))
        self._skip = skip
        self._held: list[str] = []
        self._is_cut = False  # then all that comes is held

    @property
    def held(self) -> str:
        return "".join(self._held)

    def feed(self, text: str) -> str:
        if self._is_cut:
            self._held.append(text)
            return ""
        echo, text = text[: self._skip], self.held + text[self._skip :]
        self._skip -= len(echo)
        end = len(self._pattern.split(text, 1)[0])
        self._is_cut = end < len(text)
        for at in range(max(0, len(text) - self._longest + 1), end):
            if any(stop.startswith(text[at:]) for stop in self._stops):
                end, self._is_cut = at, False  # a longer one may begin before that
                break
        self._held = [text[end:]]
        return echo + text[:end]

    def finish(self, reason: Any) -> str:
        """The rest: what follows a stop string is none if that is why the text ended."""
        is_natural = reason in _NATURAL_ENDS
        return self._pattern.split(self.held, 1)[0] if is_natural else self.held


# --- requests ---
# Attempts and retries, each under its clock. All ends as a whole reply or an error of
# openai's tree, which holds no key, nor does a variable of a frame that raises it.

_MAX_REDIRECTS = 5
_LONGEST_RETRY_AFTER = 120.0  # seconds; a server that wants more gets no retry
_CODINGS = re.compile(r"\b(gzip|deflate|br|zstd|compress|dcb|dcz)\b", re.IGNORECASE)
_STREAM_START = re.compile(rb"\s*([:deir\xef]|\s\Z)")  # of a field, or of a BOM
_REFUSAL_SECONDS = 0.1  # for the rest of a body that is not the stream asked for
_WORDS = re.compile("(error_|)(errors?|message|msg|details?|title|reason|description)")
_TOO_LONG = re.compile("(?i)(token|total|text).len|context.[lw]|(prompt|input).* long")


class _Exchange:
    """One request: the attempts at it, and the errors that come of them."""

    def __init__(
        self, client: LightLLMClient, method: str, url: str, body: Any, call: _Json
    ) -> None:
        self._client, self._attempts = client, 0
        self._timeout = _check_timeout(call.pop("timeout", NOT_GIVEN), client.timeout)
        query = {**client.default_query, **(call.pop("extra_query", None) or {})}
        self._request = Request(method, _add_query(url, query))
        data = None if body is None else _dump_request(body).encode()
        headers = _request_headers(client, call.pop("extra_headers", None) or {})
        for name in call:
            raise _unknown_name(name, _CALL_OPTIONS, call)
        # filled from one that was parsed before: making or copying one takes longer
        self._wire: Any = object.__new__(urllib.request.Request)
        vars(self._wire).update(vars(client._transport.parse_url(self._request.url)))
        self._wire.method, self._wire.data, self._wire.headers = method, data, headers
        if client.is_closed():
            raise self.error(APIConnectionError, "this client is closed")

    def fetch(self, build: Callable[[Any], Any] | None) -> Response:
        """The reply with its body, and what `build` makes of its JSON."""
        response, _ = self.send(is_stream=False)
        problem = hint = ""
        try:
            response._parsed = build(response.json()) if build else response.json()
        except _LostCall as lost:
            response._parsed, hint = lost.args[1], _WAY_OUT
            problem = f"an incomplete answer: {lost.args[0]}"
        except (AttributeError, LookupError, TypeError, ValueError):
            problem = "a body that is not the JSON asked for"
        self.log(response, getattr(response._parsed, "usage", None))
        if problem:  # no frame of this error holds the body, which may echo the key
            error = self._reply_error(response, problem, hint)
            error.partial = response._parsed
            raise error
        return response

    def send(self, is_stream: bool) -> tuple[Response, _Reply]:
        """The first good reply, after the retries that are due; a stream's head only."""
        while True:
            self._attempts += 1
            try:
                return self._attempt(is_stream)
            except APIError as error:
                response = getattr(error, "response", None)
                if response:
                    self.log(response)
                delay = self._retry_delay(error.__cause__, response)
                if delay is None:
                    raise
                import logging

                text = f"attempt {self._attempts} failed, next in {delay:.1f} s"
                logging.getLogger(__name__).info(f"{text}: {error.message}")
            time.sleep(delay)

    def _attempt(self, is_stream: bool) -> tuple[Response, _Reply]:
        started, reply = time.monotonic(), None
        try:
            self._wire.clock = _Clock(self._timeout)
            reply = self._open(self._wire)
            response = Response(self._request, reply.status, reply.headers)
            response.retries_taken = self._attempts - 1
            response._seconds = time.monotonic() - started
            is_coded = _CODINGS.search(reply.headers.get("content-encoding", ""))
            if not 200 <= reply.status < 300:
                response.content = b"" if is_coded else reply.read_error()
                raise self._reply_error(response, "")
            if is_coded:
                raise self._reply_error(response, "a coded body, not asked for")
            if is_stream:
                self._check_stream(response, reply)
            else:
                response.content = reply.read()
            response._seconds = time.monotonic() - started
            return response, reply
        except BaseException as cause:
            if reply:
                reply.abort()
            if not isinstance(cause, OSError) or _is_foreign_timeout(cause):
                raise
            broken = cause
        # without its frames, which hold what was read (PyPy restores them until here)
        raise self.connection_error(broken) from broken.with_traceback(None)

    def _open(self, wire: Any, hops: int = _MAX_REDIRECTS) -> _Reply:
        """The reply behind redirects within the origin, which get the same request."""
        reply: _Reply = self._client._opener.open(wire)
        if hops and reply.status in (307, 308):
            url, target = wire.full_url, reply.headers.get("location", "")
            if target and not re.match("//|[a-zA-Z][a-zA-Z0-9+.-]*:", target):
                target = urllib.parse.urljoin(url, target)
            if _origin(target) == _origin(url):
                reply.read_error()
                wire, wire.full_url = copy.copy(wire), target
                return self._open(wire, hops - 1)
        return reply

    def _check_stream(self, response: Response, reply: _Reply) -> None:
        """Some gateways label events application/json: then the first bytes must tell."""
        if "event-stream" in response.headers.get("content-type", "").lower():
            return
        response.content = reply.read_next()
        if not _STREAM_START.match(response.content):
            response.content += reply.read_error(_REFUSAL_SECONDS)
            raise self._reply_error(response, "a body that is not a stream of events")
        reply.pieces = itertools.chain([response.content], reply.pieces)
        response.content = b""

    def _retry_delay(self, cause: Any, response: Response | None) -> float | None:
        """Seconds until the next attempt; None for none."""
        is_final = isinstance(cause, _ProxyError) or hasattr(cause, "verify_message")
        seconds = 0.0
        if response:
            status, headers = response.status_code, response.headers
            is_retried = status in (408, 409, 429) or status >= 500
            told = headers.get("x-should-retry", "").lower()
            is_final = told == "false" or not (is_retried or told == "true")
            seconds = _parse_delay(headers.get("retry-after-ms", "")) / 1000
            seconds = seconds or _parse_delay(headers.get("retry-after", ""))
        is_last = self._attempts > self._client.max_retries
        if is_last or is_final or seconds > _LONGEST_RETRY_AFTER:
            return None
        backoff = 0.5 * 2 ** min(self._attempts - 1, 4)
        return seconds or backoff * (1 - 0.25 * random.random())

    def log(self, response: Response, usage: Any = None) -> None:
        """A line without texts at DEBUG, if logging is there: importing it takes long."""
        logging: Any = sys.modules.get("logging")
        log = logging and logging.getLogger(__name__)
        if log and log.isEnabledFor(logging.DEBUG):
            tokens = usage.get("total_tokens") if isinstance(usage, dict) else "unknown"
            text = f"{self._label()}: status {response.status_code}"
            text += f", {response._seconds:.3f} s, {tokens} tokens"
            log.debug(self._redact(f"{text}, attempt {self._attempts}"))

    def error(self, kind: Any, what: str) -> Any:
        """An error without a response."""
        message = self._redact(f"{self._label()}: {what}")
        return kind(message=message, request=self._request)

    def connection_error(self, cause: OSError, what: str = "") -> Any:
        """The error for a connection that failed; `what` says what a broken one lost."""
        kind, text = APIConnectionError, cause.strerror or str(cause) or repr(cause)
        if isinstance(cause, _ClockTimeout):
            kind, text = APITimeoutError, f"timed out after {self._timeout} s"
        proxy = self._client._transport.route(self._wire).proxy
        if proxy:
            text = f"through the proxy {proxy} (check HTTP_PROXY and NO_PROXY): {text}"
        text = f"{what}; {text}" if what else text
        hint = _advice(text, _HINTS.get(type(cause).__name__, ""))
        tries = f"{self._attempts} attempt{'s' * (self._attempts > 1)}"
        return self.error(kind, f"{text} ({tries}){hint}")

    def event_error(self, response: Response, text: str, data: Any) -> Any:
        """The error that an event reports, or that it is not a JSON object."""
        response.content = text.encode()
        if not isinstance(data, dict) and not isinstance(text, _ErrorText):
            what = "an event that is not a JSON object"
            return self._reply_error(response, what, "the answer is incomplete")
        body, words = self._clean(response)
        message = f"{words} (in the stream of {self._label()}){_advice(words)}"
        return APIError(message, self._request, body=body)

    def _reply_error(self, response: Response, what: str, hint: str = "") -> Any:
        """The error for `what` a good status came with, or for another status."""
        body, words = self._clean(response)
        status, location = response.status_code, response.headers.get("location")
        kind: Any = APIResponseValidationError
        start = f"{self._label()}: status {status} with {what}"
        hint = hint or "is base_url that of a LightLLM server?"
        if not what:
            start = f"Error code: {status} from {self._label()}"
            kind = _STATUS_ERRORS.get(min(status, 500), APIStatusError)
            hint = _HINTS.get(status, "")
        if location and 300 <= status < 400:
            words = _error_words(f"a redirect, not followed, to {_shown_url(location)}")
            hint = "check base_url: scheme, host, port, and whether it asks for a login"
        message = f"{start}: {words or 'no text'}{_advice(words, hint)}"
        return kind(message=message, response=response, body=body)

    def _label(self) -> str:
        return f"{self._request.method} {_shown_url(self._request.url)}"

    def _clean(self, response: Response) -> tuple[Any, str]:
        """Redact a response for an error. The error's body, and the server's words."""
        hide, headers = self._redact, response.headers
        text = hide(response.text)
        response.content = text.encode()
        response.headers = Headers({hide(n): hide(headers[n]) for n in headers})
        try:  # in JSON they may still stand in an escaped form
            body = _parse_json(hide(_dump_json(_parse_json(text))))
            words = _error_words(body) or _error_words(text)
        except (RecursionError, ValueError):
            body, words = text, _error_words(text)
        body = body.get("error") or body if isinstance(body, dict) else body
        return body, words

    def _redact(self, text: str) -> str:
        """`text` without the secrets of this request's headers."""
        login = self._client._transport.route(self._wire).login
        headers = {**self._wire.headers, **login}
        for name in ("Authorization", "Proxy-authorization", "Api-key", "X-api-key"):
            secret = headers.get(name, "").rpartition(" ")[2]
            for form in {secret, _dump_json(secret)[1:-1]} - {""}:
                # a short one, such as "EMPTY", only as a word, or behind an escape of JSON
                edges = r"((?<!\w)|(?<=\\[bfnrt])){}(?!\w)" if len(secret) < 8 else "{}"
                text = re.sub(edges.format(re.escape(form)), "***", text)
        return text


def _advice(words: str, hint: str = "") -> str:
    """What to try: what the server says tells more than the hint for its status."""
    if _TOO_LONG.search(words):
        hint = "lower max_tokens (10000 unless given), which counts too, or send less"
    elif "pd mode" in words:
        hint = "this node only serves others: base_url must name the pd_master"
    return hint and f"; {hint}"


def _error_words(data: Any) -> str:
    """The words in an error's JSON of any shape, in order: a line of 300 characters."""
    words: list[str] = []
    rest = [data]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            steps = value.get("loc")  # FastAPI: the way to the field that is wrong
            value = [value[name] for name in value if _WORDS.fullmatch(name)]
            if isinstance(steps, list):
                place = ".".join(map(str, steps))
                value = [f"{place}: {word}" for word in value]
        if isinstance(value, list):
            rest += reversed(value)
        elif isinstance(value, str):
            words.append(value)
    text = "; ".join(filter(str.strip, words))
    text = re.sub(r"[\s\0-\x1f\x7f-\x9f]+", " ", text).strip()
    return text[:300] + "..." * (len(text) > 300)


# --- request parts ---
# URLs and headers, without state. An origin is what a key may be sent to: scheme, host and
# port.

_UNSENDABLE = re.compile(r"[^\x20-\x7e\x80-\xff]")
_ORIGIN = re.compile(r"(https?)://(\[[^]/]*]|[^][/?#:@\\]+)(?::(\d{0,5}))?(?=[/?#]|\Z)")


def _parse_delay(text: str) -> float:
    """The seconds that a Retry-After asks for; 0 for none."""
    from email.utils import mktime_tz, parsedate_tz

    date = parsedate_tz(text)
    try:
        seconds = mktime_tz(date) - time.time() if date else float(text)
    except (OverflowError, ValueError):
        return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0


def _origin(url: str) -> Any:
    """Scheme, host and port; None if it is not a plain HTTP URL."""
    found = _ORIGIN.match(url.lower())
    ports = {"http": "80", "https": "443"}
    return found and (found[1], found[2], found[3] or ports[found[1]])


def _shown_url(url: str) -> str:
    """A URL as messages show it: its query and credentials may be secret."""
    return re.sub(r"(?<=//)[^/?#]*@|[?#].*", "", url)


def _add_query(url: str, query: Mapping[str, Any]) -> str:
    pairs, mark = [], "&" if "?" in url else "?"
    for name, value in query.items():
        is_list = isinstance(value, (list, tuple))
        for item in value if is_list else [value]:
            if item is not None and _is_given(item):
                item = str(item).lower() if isinstance(item, bool) else item
                pairs.append((name + "[]" * is_list, item))
    return url + mark + urllib.parse.urlencode(pairs) if pairs else url


def _request_headers(client: LightLLMClient, extra: Any) -> _StrDict:
    key: Any = client.api_key
    if not isinstance(key, _Secret):  # it was not checked yet
        key = _hide(key() if callable(key) else key)  # so that no variable shows it
        key = _check_key(key)
    headers = {
        "Accept": "application/json",
        "Accept-encoding": "identity",
        "Content-type": "application/json",
        "User-agent": f"lightllm_client/{__version__}",
    }
    if key:
        headers["Authorization"] = _Secret(f"Bearer {key}")
    own = {"OpenAI-Organization": client.organization, "OpenAI-Project": client.project}
    return _merge_headers(headers, own, client.default_headers, extra)


def _merge_headers(merged: _StrDict, *layers: Any) -> _StrDict:
    """Headers named as urllib does, `Content-type`; a later layer's replace earlier ones."""
    for layer in layers:
        for name, value in layer.items():
            name = name.capitalize()
            merged.pop(name, None)
            if value is not None and _is_given(value):
                merged[name] = _Secret(value)
                if not re.fullmatch(r"[!-9;-~]+: [ -~\x80-\xff]*", f"{name}: {value}"):
                    what = "it needs a name, and no control characters"
                    raise ValueError(f"the header {name!r} cannot be sent: {what}")
    return merged


# --- connections ---
# urllib's requests on http.client's connections, one at a time on each. None waits longer
# than its clock says, and what was sent whole is never sent again from here.

_READ_SIZE = 65536
_LONGEST_WAIT = 3e6  # seconds; more overflows what the system takes
_DIAL_SECONDS = 10.0  # for an address of a host that has others left to try
# routers forget a connection that is silent for two minutes; the last name is macOS's
_TCP_OPTIONS = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60}
_TIMEOUTS = (socket.timeout, TimeoutError)  # one and the same since Python 3.10


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


class _Connection(http.client.HTTPConnection):
    """Sends requests, and holds what was received of the reply and not read yet."""

    buffer = b""
    is_stale = False  # it broke before the request was sent
    idle_since = 0.0
    _is_waiting = _is_aborted = False

    def exchange(self, transport: _Transport, route: _Route, request: Any) -> _Reply:
        """Send a request; the reply, its head read."""
        self.transport, self.route = transport, route
        self.clock: _Clock = request.clock
        if not self.sock:
            self.connect()
        self.clock.enter("write")
        body = request.data or b""
        headers = {"Host": request.host, **request.headers}
        target = request.selector or "/"
        if route.proxy and not route.tls:
            target = request.full_url
            headers.update(route.login)
        if body:
            headers["Content-Length"] = str(len(body))
        try:
            self._send(f"{request.get_method()} {target}", headers, body)
        except OSError as error:
            # perhaps behind a reply: large bodies are refused early
            if isinstance(error, _TIMEOUTS) or not error.errno:  # a signal handler's
                raise
            self.is_stale = True
        self.clock.enter("read")
        return _Reply(self)

    def connect(self) -> None:
        self._owner, route = os.getpid(), self.route
        self._dial()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_OPTIONS.items():
            if hasattr(socket, name):
                self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if not route.tls:
            return
        if route.proxy:  # it gets its own credentials and never the key
            target = route.authority
            self._send(f"CONNECT {target}", {"Host": target, **route.login})
            status = _Reply(self).status
            self.buffer = b""  # what comes behind it is not the server's
            if status >= 300:
                kind = OSError if status >= 500 else _ProxyError
                raise kind(f"the proxy refused to open a tunnel, with status {status}")
        wrap = self.transport.tls_context().wrap_socket
        # an end without close_notify is a cut
        options = {"server_hostname": route.host, "suppress_ragged_eofs": False}
        self.sock = self._call(self.clock, wrap, self.sock, **options)

    def _dial(self) -> None:
        """Connect to the first address that answers."""
        if not self.host:
            raise _ProxyError("only proxies of the form http://host:port can be used")
        found = socket.getaddrinfo(self.host, self.port, 0, socket.SOCK_STREAM)
        while not self.sock:
            *kind, _, address = found.pop(0)
            clock = self.clock
            if found:  # a silent address must leave time for those behind it
                clock = _Clock(min(_DIAL_SECONDS, clock.left() / (1 + len(found))))
            try:
                self.sock = socket.socket(*kind)
                self._call(clock, self.sock.connect, address)
            except OSError as error:
                self.close()
                if not found or _is_foreign_timeout(error):
                    raise

    def _send(self, line: str, headers: _StrDict, body: bytes = b"") -> None:
        lines = map(": ".join, headers.items())
        head = _Secret("\r\n".join([line + " HTTP/1.1", *lines, "", ""]))
        # a small body in one go with the head; and a view's repr shows no header
        first = memoryview(head.encode("latin-1") + body[:_READ_SIZE])
        for view in (first, memoryview(body)[_READ_SIZE:]):
            while view:
                view = view[self._call(self.clock, self.sock.send, view) :]

    def _call(self, clock: _Clock, method: Any, *arguments: Any, **options: Any) -> Any:
        """Call a method of the socket, within the time that is left."""
        left = clock.left()
        # setting it costs a system call: better up to 40 ms late, and never early
        if not 0 <= (self.sock.gettimeout() or 0.0) - left < 0.04:
            self.sock.settimeout(left + 0.02)
        try:
            return method(*arguments, **options)
        except _TIMEOUTS:
            clock.left()  # raises when the time is up
            raise

    def receive(self) -> Any:
        """The next bytes, b"" at the end. Raises OSError after `abort`."""
        self._is_waiting = True
        try:
            if self._is_aborted:
                raise OSError("the connection was closed")
            return self._call(self.clock, self.sock.recv, _READ_SIZE)
        finally:
            self._is_waiting = False
            if self._is_aborted:
                self.close()

    def grow(self) -> None:
        """Receive more for what has to be read in one piece."""
        if len(self.buffer) > _MAX_HEAD:
            raise _BadReply("an endless head, chunk head or trailer")
        raw = self.receive()
        if not raw:
            raise http.client.RemoteDisconnected("the server closed in mid-reply")
        self.buffer += raw

    def read_until(self, end: re.Pattern[bytes]) -> bytes:
        while not (found := end.search(self.buffer)):
            self.grow()
        raw, self.buffer = self.buffer[: found.start()], self.buffer[found.end() :]
        return raw

    def abort(self) -> None:
        """Close at once. A thread that waits in `receive` is woken and closes by itself:
        the descriptor's number could be another socket's by the time it wakes."""
        self._is_aborted = True
        sock = self.sock
        if sock and self._owner == os.getpid():  # a child leaves it to its parent
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is not connected any more
        if not self._is_waiting:
            self.close()

    def is_usable(self) -> bool:
        """Young, this process's, and with nothing to read, which would be its end."""
        is_old = time.monotonic() > self.idle_since + IDLE_SECONDS
        if is_old or self._owner != os.getpid():
            return False
        if not hasattr(select, "poll"):  # Windows, or eventlet took it away
            try:
                return not select.select([self.sock], [], [], 0)[0]
            except ValueError:  # a descriptor above 1023
                return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)


# --- routes and idle connections ---
# Which way an origin is reached, and the connections between uses: only such whose reply
# ended exactly. There is no lock: a list's append and pop are atomic.


class _Route:
    """The way to one origin, perhaps by a proxy, and the idle connections on it."""

    def __init__(self, scheme: str, authority: str, proxies: _StrDict) -> None:
        _, name, port = _origin(f"{scheme}://{authority}")
        self.tls = scheme == "https"
        self.host = name.strip("[]")
        self.authority = f"{name}:{port}"
        self.dial = (self.host, int(port))
        self.idle: list[_Connection] = []  # the one used last is the last
        self.proxy = ""  # as messages show it
        self.login: _StrDict = {}
        proxy = proxies.get(scheme) or proxies.get("all")
        exempt = f"localhost,127.0.0.0/8,0.0.0.0,::1,{proxies.get('no', '')}".lower()
        matches = map(self._matches, exempt.replace(",", " ").split())
        if not proxy or any(matches) or urllib.request.proxy_bypass(self.host):
            return  # macOS and Windows have exceptions of their own
        url = proxy if "://" in proxy else "http://" + proxy
        scheme, _, place = url.partition("//")
        login, _, place = place.rpartition("@")
        self.proxy = f"{scheme}//{place}"
        scheme, name, port = _origin(self.proxy) or ("", "", 0)
        self.dial = (name.strip("[]") if scheme == "http" else "", int(port))
        if login:
            pair = login if ":" in login else login + ":"
            token = base64.b64encode(urllib.parse.unquote_to_bytes(pair)).decode()
            self.login = {"Proxy-authorization": _Secret("Basic " + token)}

    def pop_idle(self) -> _Connection | None:
        """The one used last of those that are still usable."""
        try:
            while True:
                connection = self.idle.pop()
                if connection.is_usable():
                    return connection
                connection.close()
        except IndexError:  # another thread may have been quicker than any check
            return None

    def _matches(self, entry: str) -> bool:
        """Whether NO_PROXY's entry, `*`, a name, `name:port` or a network, has this host."""
        suffix = "." + entry.lstrip("*.")
        is_name = f".{self.host}".endswith(suffix)
        if entry == "*" or is_name or f".{self.authority}".endswith(suffix):
            return True
        from ipaddress import ip_address, ip_network

        try:
            return ip_address(self.host) in ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            return False


class _Transport(urllib.request.BaseHandler):
    """The opener's handler: idle connections, routes, and the TLS context of a client."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        self.closed = False
        self._context = ssl_context
        proxies = urllib.request.getproxies().items()
        self._proxies: _StrDict = {name: _Secret(url.strip()) for name, url in proxies}
        self._routes: dict[Any, _Route] = {}
        self.parse_url = functools.lru_cache(9)(urllib.request.Request)

    def add_parent(self, parent: Any) -> None:
        """Not to know the opener lets both be freed at once."""

    def default_open(self, request: Any) -> _Reply:
        route = self.route(request)
        while True:
            connection = route.pop_idle() or _Connection(*route.dial)
            try:
                return connection.exchange(self, route, request)
            except BaseException as error:
                connection.close()
                is_fault = isinstance(error, OSError) and not _is_foreign_timeout(error)
                if not (connection.idle_since and connection.is_stale and is_fault):
                    raise

    def route(self, request: Any) -> _Route:
        key = (request.type, request.host)
        found = self._routes.get(key)
        return found or self._routes.setdefault(key, _Route(*key, self._proxies))

    def tls_context(self) -> ssl.SSLContext:
        if not self._context:
            import ssl

            self._context = ssl.create_default_context()
            self._context.options &= ~0x80  # OP_IGNORE_UNEXPECTED_EOF of 3.8 and 3.9
        return self._context

    def release(self, connection: _Connection, is_reusable: bool) -> None:
        """Keep a connection behind a whole reply, or close it."""
        idle = connection.route.idle
        connection.idle_since = time.monotonic()
        del connection.transport  # a cycle: a dropped client would not close it
        if is_reusable and not self.closed and len(idle) < MAX_IDLE_CONNECTIONS:
            idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        self.closed = True
        for route in list(self._routes.values()):
            idle, route.idle = route.idle, []
            for connection in idle:
                connection.close()

    __del__ = close


# --- replies ---
# Received bytes -> the head and the body of a reply. What is cut, corrupt or endless raises
# OSError, in bounded time and memory; nothing that the server wrote is in its message.

_HEAD_END = re.compile(rb"\n\r?\n")  # behind a CR, perhaps: with it the search is slow
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) +([0-9]{3})(?= |\Z)")
_LENGTH = re.compile(r"([0-9]{1,18})(?: *, *\1)*")  # the same one may come twice
_CHUNK = re.compile(rb"\r?\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
_TRAILERS_END = re.compile(rb"(?:\A|\n)\r?\n")
_MAX_HEAD = 65536  # bytes of a response's head, of a chunk's head, of trailers
_MAX_INTERIM = 10  # 1xx replies before the real one
_FINISH_SECONDS = 0.1  # for the end of a body behind [DONE], to keep the connection


class _BadReply(ConnectionError):
    """A reply that HTTP does not allow, or that is too large."""


def _parse_head(head: bytes) -> tuple[str, int, _StrDict]:
    """HTTP's minor version, the status, and the headers by their lower-case names."""
    text = (head.decode("latin-1") + "\n").replace("\r\n", "\n")
    lines = text.replace("\n ", " ").replace("\n\t", " ").split("\n")
    status = _STATUS_LINE.match(lines[0])
    if not status:
        raise _BadReply("not an HTTP/1 reply: is it an HTTP server?")
    headers: _StrDict = {}
    is_bad = "\0" in text or "\r" in text
    for line in lines[1:-1]:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if is_bad or not colon or name.split() != [name]:
            raise _BadReply("a malformed header line")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return status[1], int(status[2]), headers


def _read_length(connection: _Connection, left: int) -> _Pieces:
    """A body of Content-Length bytes."""
    while left:
        if not connection.buffer:
            connection.grow()
        raw, connection.buffer = connection.buffer[:left], connection.buffer[left:]
        left -= len(raw)
        yield raw


def _read_chunked(connection: _Connection) -> _Pieces:
    """A body in chunks, each behind its size: the data of all that are there at once."""
    connection.buffer = b"\n" + connection.buffer  # now the first is like the others
    size, end = 1, 0  # of the last chunk, and where it ends, be that there yet or not
    while size:
        raw, pieces = connection.buffer, [connection.buffer[:end]]
        while size:
            head = _CHUNK.match(raw, end)
            if not head:
                break
            size = int(head[1], 16)
            end = head.end() + size
            pieces.append(raw[head.end() : end])
        connection.buffer, end = raw[end:], max(0, end - len(raw))
        if any(pieces):
            yield b"".join(pieces)
        if size:
            if b"\n" in connection.buffer[2:]:
                raise _BadReply("a corrupt chunk")
            connection.grow()
    connection.read_until(_TRAILERS_END)


class _Reply:
    """One reply: its head, which is read at once, and its body piece by piece."""

    def __init__(self, connection: _Connection) -> None:
        self._connection, self._is_over = connection, False
        for _ in range(_MAX_INTERIM):
            head = connection.read_until(_HEAD_END)
            version, self.status, headers = _parse_head(head)
            if self.status >= 200:
                break
        else:
            raise _BadReply("too many interim (1xx) replies")
        self.headers = Headers(headers)
        self.pieces = self._read_pieces(version, headers)

    def _read_pieces(self, version: str, headers: _StrDict) -> _Pieces:
        """The body, to its exact end, where the connection is kept or closed."""
        connection, length = self._connection, headers.get("content-length")
        coding, size = headers.get("transfer-encoding"), _LENGTH.fullmatch(length or "")
        if self.status == 204:
            pass  # it has none
        elif coding is not None:
            if coding.lower() != "chunked":
                raise _BadReply("a transfer coding that was not asked for")
            yield from _read_chunked(connection)
        elif length is None:  # it ends with the connection
            if connection.buffer:
                yield connection.buffer
            yield from iter(connection.receive, b"")
        elif not size:
            raise _BadReply("a Content-Length that is not one number")
        else:
            yield from _read_length(connection, int(size[1]))
        self._is_over = True
        is_framed = version == "1" and (length is None) != (coding is None)
        is_open = "close" not in headers.get("connection", "").lower()
        is_read = not (connection.is_stale or connection.buffer)
        is_good = self.status < 300  # else the request may be unread, or uvicorn closes
        is_reusable = is_framed and is_open and is_read and is_good
        connection.transport.release(connection, is_reusable)

    def abort(self) -> None:
        """Close the connection, unless the body's end has let it go."""
        if not self._is_over:
            self._is_over, self.pieces = True, iter(())
            self._connection.abort()

    def read_next(self) -> bytes:
        """A stream's next bytes, b"" at its end. The timeout limits each wait."""
        self._connection.clock.restart("read")
        return next(self.pieces, b"")

    def read(self) -> bytes:
        """The whole body. Raises where it is larger than MAX_REPLY_BYTES."""
        body = bytearray()
        for raw in self.pieces:
            body += raw
            if len(body) > MAX_REPLY_BYTES:
                raise _BadReply("a body larger than MAX_REPLY_BYTES")
        return bytes(body)

    def read_error(self, seconds: float = _LONGEST_WAIT) -> bytes:
        """What comes in so many seconds of an error's body, which need not be whole."""
        body, clock = bytearray(), self._connection.clock
        try:
            self._connection.clock = _Clock(min(seconds, clock.left()))
            for raw in self.pieces:
                body += raw
                if len(body) > MAX_ERROR_BYTES:
                    break
        except OSError as error:
            if _is_foreign_timeout(error):
                raise
        finally:
            self.abort()
        return bytes(body[:MAX_ERROR_BYTES])

    def finish(self) -> None:
        """The answer is whole: keep the connection if the body's end is there too."""
        if not self._is_over:  # or the connection may be another request's by now
            self.read_error(_FINISH_SECONDS)


# --- command line ---
# Only LIGHTLLM_* counts, and the key comes from nowhere else: all users of a machine can
# see its command lines. Answers go to stdout; reasoning, notes and errors to stderr.

_EPILOG = """\
Asks a LightLLM server. The key is read from LIGHTLLM_API_KEY.

examples:
  python lightllm_client.py What is the capital of France?
  git diff | python lightllm_client.py -s "You review code." "Is this correct?"

exit status: 0 for an answer, also for one that --max-tokens cut off (stderr says so),
1 for an error or a broken answer, 2 for wrong arguments, 130 for Ctrl-C
"""
_SOUND_PARSERS = re.compile("qwen(25)?|deepseekv3[12]?|mistral")  # from April 2026 on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    sys.stdin = sys.stdin or io.StringIO()  # None where it is closed
    if isinstance(sys.stdin, io.TextIOWrapper):  # the C locale lets any byte pass
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal has every letter
            stream.reconfigure(errors="replace")
    try:
        status = _run(_parse_arguments(arguments))
        print(end="", flush=True)  # a closed pipe must show here, not at exit
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # or the flush at exit would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OpenAIError, ValueError, OSError) as error:
        return _report(f"error: {error}")


def _parse_arguments(arguments: Sequence[str] | None) -> Any:
    import argparse
    import hashlib
    import pathlib

    code = pathlib.Path(__file__).read_text("utf-8")  # makes all line ends the same
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    parser = argparse.ArgumentParser(epilog=_EPILOG, argument_default=NOT_GIVEN)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    url = os.getenv("LIGHTLLM_BASE_URL") or "http://localhost:8000"
    add("prompt", nargs="*", help="the question; text from a pipe follows it")
    add("-s", "--system", help="a system message")
    add("-m", "--model", default=os.getenv("LIGHTLLM_MODEL"), help="or LIGHTLLM_MODEL")
    add("--image", action="append", default=[], help="a file; repeatable")
    add("--base-url", default=url, help="or LIGHTLLM_BASE_URL; now %(default)s")
    for name in ("--timeout", "--temperature", "--top-p"):
        add(name, type=float)
    for name in ("--top-k", "--max-tokens"):
        add(name, type=int)
    add("--no-stream", action="store_true", help="print the answer when it is whole")
    add("--json", action="store_true", help="print the whole completion as JSON")
    add("--models", action="store_true", help="list the served models")
    add("--check", action="store_true", help="tell what the server is, how to use it")
    add("--version", action="version", version=f"{__version__} sha256 {digest}")
    options = parser.parse_intermixed_args(arguments)
    system = {"role": "system", "content": options.system}
    options.history = [system] if options.system else []
    urls = [pathlib.Path(path).absolute().as_uri() for path in options.image]
    options.image = [{"type": "image_url", "image_url": url} for url in urls]
    return options


def _report(text: str) -> int:
    """Print a line on stderr; returns the exit status of an error."""
    print(" ".join(text.split()), file=sys.stderr)
    return 1


def _run(options: Any) -> int:
    key = os.getenv("LIGHTLLM_API_KEY", "")
    client = LightLLMClient(key, options.base_url, options.timeout)
    text, is_terminal = " ".join(options.prompt or []), sys.stdin.isatty()
    if options.check:
        return _check(client, options)
    if options.models:
        print(*[model.id for model in client.models.list()], sep="\n")
    elif is_terminal and sys.stdout.isatty() and not text:
        _chat(client, options)
    else:
        if text == "-":
            text = sys.stdin.read()
        elif not is_terminal:
            text = f"{text}\n\n{sys.stdin.read()}"
        if not text.strip():
            raise ValueError("a prompt is needed, as arguments or on stdin")
        _print_answer(client, options, text.strip("\n"))
    return 0


def _chat(client: LightLLMClient, options: Any) -> None:
    """Answer each line that is typed, with the history before it."""
    try:
        __import__("readline")  # to edit and recall lines, where it is there
    except ImportError:
        pass
    _report("/quit or Ctrl-D ends the chat, Ctrl-C stops an answer.")
    while True:
        try:
            text = input("> ").strip()
            if text == "/quit":
                return
            if text:
                _print_answer(client, options, text)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
        except (OpenAIError, ValueError, OSError) as error:
            _report(f"error: {error}")


def _print_answer(client: LightLLMClient, options: Any, text: str) -> None:
    """Print an answer as it comes; the history grows by it and its question."""
    question = {"role": "user", "content": [*options.image, text]}
    options.model = options.model or _find_model(client)["id"]
    is_plain = options.json or options.no_stream
    sent: _Json = {"messages": [*options.history, question], "stream": not is_plain}
    for name in ("model", "temperature", "top_p", "top_k", "max_tokens"):
        sent[name] = getattr(options, name)
    answer: Any = client.chat.completions.create(**sent)
    if options.json:
        print(answer.to_json())
        if answer.choices[0].finish_reason == "length":
            _report("note: the answer is cut off (length)")
        return
    said, line_end, reason = "", "", None
    try:
        for chunk in [answer] if is_plain else answer:
            for choice in chunk.choices:
                piece = choice.message if is_plain else choice.delta
                reason = choice.finish_reason or reason
                thought = getattr(piece, "reasoning", None)
                if thought:
                    print(thought, end="", file=sys.stderr, flush=True)
                    line_end = "\n"
                if piece.content:
                    print(end=line_end, file=sys.stderr)
                    said, line_end = said + piece.content, ""
                    print(piece.content, end="", flush=True)
    finally:
        if not is_plain:
            answer.close()
        print(end=line_end, file=sys.stderr)
        if said:
            print()
            options.image = []  # it is in the history now
            options.history += [question, {"role": "assistant", "content": said}]
    if reason == "length" or not said:
        _report(f"note: the answer is {'cut off' if said else 'empty'} ({reason})")


def _find_model(client: LightLLMClient) -> Any:
    """The first served model; builds before April 2026 list none, and take any name."""
    try:
        return client.get("/v1/models")["data"][0]
    except (NotFoundError, APIResponseValidationError, TypeError, LookupError):
        return {"id": "default"}


def _check(client: LightLLMClient, options: Any) -> int:
    """Tell in a few lines whether the server works, and how to use it."""
    health = client.health()
    print(f"server: {'ready' if health else 'NOT ready'}: {health.reason}")
    if not health:
        return 1
    model, parser = _find_model(client), ""  # max_model_len: from April 2026 on
    print(f"model: {model['id']}, {model.get('max_model_len', '?')} tokens of context")
    try:
        parser = client.get("/get_server_info")["tool_call_parser"] or ""
    except (APIStatusError, APIResponseValidationError, TypeError, LookupError):
        pass  # builds of 2025 do not tell
    advice = "'prompt': 'server' may lose or damage calls"
    if "max_model_len" in model and _SOUND_PARSERS.fullmatch(str(parser)):
        advice = "'server' or 'prompt': its model's calls are read"
    print(f"tools: parser {parser or 'unknown'}: use tool_mode={advice}")
    begun = time.monotonic()
    name = options.model or model["id"]
    question = {"role": "user", "content": "Say yes."}
    client.chat.completions.create(model=name, messages=[question], max_tokens=1)
    print(f"round trip: {time.monotonic() - begun:.3f} s for one token")
    return 0


# --- licence ---
# MIT License
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
