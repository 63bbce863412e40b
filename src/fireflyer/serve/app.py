"""The application: paths to endpoints. In: an engine and settings. Out: a FastAPI application for any ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from fireflyer import __version__
from fireflyer.infer.async_engine import AsyncEngine
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.serve.chat_completions import ChatAnswer
from fireflyer.serve.completions import CompletionAnswer
from fireflyer.serve.errors import add_handlers
from fireflyer.serve.guard import Counter, HostGuard, key_check
from fireflyer.serve.openapi import ERRORS, EVENTS, add_bodies, body_of
from fireflyer.serve.page_files import PageFiles
from fireflyer.serve.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from fireflyer.serve.responses import (
    ChatCompletion,
    Completion,
    ModelCard,
    ModelExtras,
    ModelList,
    Text,
    TokenizerInfo,
    Tokens,
)
from fireflyer.serve.service import Service, in_thread
from fireflyer.serve.settings import ServeSettings
from fireflyer.serve.streaming import EventStream, Whole, read_body
from fireflyer.text.templates import CHAT_TEMPLATE


def create_app(engine: AsyncEngine, settings: ServeSettings) -> FastAPI:
    """One served model. The caller closes the engine after the application has ended."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(service.readiness.watch()), asyncio.create_task(_warm_up(service))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(title="Fireflyer", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    add_handlers(app)
    with_key = [Depends(key_check(settings.api_key))]
    app.include_router(_answers(service), prefix="/v1", dependencies=with_key)
    app.include_router(_models(service), prefix="/v1", dependencies=with_key)
    app.include_router(_tokens(service), dependencies=with_key)
    app.include_router(_watching(service))
    app.mount("/", PageFiles())
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(HostGuard, names=settings.allowed_hosts)
    app.add_middleware(Counter, metrics=service.metrics)
    app.openapi = lambda: add_bodies(get_openapi(title=app.title, version=app.version, routes=app.routes))
    return app


async def _warm_up(service: Service) -> None:
    """The first step is the slowest: kernels load, memory is touched. Until it is done the server is not ready."""
    token = 0 if service.tokenizer is None else service.tokenizer.bos_id
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    try:
        async for part in service.engine.generate([token], params):
            service.readiness.failure = part.error
        service.readiness.warm = True
    except Exception as error:
        service.readiness.failure = f"the first step failed: {error}"


def _answers(service: Service) -> APIRouter:
    router = APIRouter(responses=EVENTS)
    timeout_s, max_bytes = service.settings.request_timeout_s, service.settings.max_body_bytes

    @router.post("/chat/completions", response_model=ChatCompletion, openapi_extra=body_of(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """The assistant's next message."""
        body = await read_body(request, ChatCompletionRequest, max_bytes)
        service.check_open(body.model)
        answer = ChatAnswer(service, body)
        return EventStream(answer.chunks(), timeout_s) if body.stream else Whole(answer.whole(), timeout_s)

    @router.post("/completions", response_model=Completion, openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """A continuation of each prompt."""
        body = await read_body(request, CompletionRequest, max_bytes)
        service.check_open(body.model)
        answer = CompletionAnswer(service, body)
        return EventStream(answer.chunks(), timeout_s) if body.stream else Whole(answer.whole(), timeout_s)

    return router


def _models(service: Service) -> APIRouter:
    router = APIRouter(responses=ERRORS)
    card = ModelCard(
        id=service.settings.served_model_name,
        object="model",
        created=service.created,
        owned_by="fireflyer",
        max_model_len=service.llm.max_length,
        fireflyer=_model_extras(service),
    )

    @router.get("/models")
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(object="list", data=[card])

    @router.get("/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """It, by its name."""
        service.check_model(name)
        return card

    return router


def _model_extras(service: Service) -> ModelExtras:
    """Every tokenizer trained here has our chat template, so having it proves no teaching; another's own does."""
    tokenizer = service.tokenizer
    return ModelExtras(
        taught_to_chat=tokenizer is not None
        and (tokenizer.taught_chat or tokenizer.chat_template not in (None, CHAT_TEMPLATE)),
        num_experts=service.llm.config.n_routed_experts or 0,
        max_output_tokens=service.settings.max_output_tokens,
    )


def _tokens(service: Service) -> APIRouter:
    """As vLLM has them: evaluation harnesses count tokens with these."""
    router = APIRouter(responses=ERRORS)
    max_bytes = service.settings.max_body_bytes

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Tokens:
        """A text as a prompt is read: the names of special tokens in it count."""
        body = await read_body(request, TokenizeRequest, max_bytes)
        service.check_model(body.model)
        tokenizer = service.tokenizer_for("a text")
        ids = await in_thread(tokenizer.encode, body.prompt, allow_special=True)
        if body.add_special_tokens and ids[:1] != [tokenizer.bos_id]:
            ids = [tokenizer.bos_id, *ids]
        return Tokens(count=len(ids), max_model_len=service.llm.max_length, tokens=ids)

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Text:
        """The text of tokens."""
        body = await read_body(request, DetokenizeRequest, max_bytes)
        service.check_model(body.model)
        tokenizer = service.tokenizer_for("a text")
        return Text(prompt=await in_thread(tokenizer.decode, body.tokens, skip_special=False))

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Its special tokens and chat template."""
        tokenizer = service.tokenizer_for("this")
        pad_token = None if tokenizer.pad_id is None else tokenizer.token_text(tokenizer.pad_id)
        return TokenizerInfo(
            bos_token=tokenizer.token_text(tokenizer.bos_id),
            eos_token=tokenizer.token_text(tokenizer.eos_id),
            pad_token=pad_token,
            chat_template=tokenizer.chat_template,
        )

    return router


def _watching(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @router.get("/ready", responses=ERRORS)
    async def ready() -> Response:
        """Requests are worth sending: warmed up, steps end, not shutting down."""
        trouble = "shutting down" if service.admission.draining else service.readiness.trouble()
        return JSONResponse({"status": trouble or "ready"}, 503 if trouble else 200)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
