"""GET / and /page/: the page to talk with, plain files of the package."""

from hashlib import sha256
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

FIRST = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# no script but those files, nothing from elsewhere, and no text that could become markup
# 'self' stands for ws of the same host too, in all browsers that can show the page
POLICY = (
    "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # asked again each time; the answer is 304 while nothing changed
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> APIRouter:
    """The files are read once: a path can name one of them and nothing else."""
    router = APIRouter(include_in_schema=False)
    shown = page_files()

    @router.head("/")
    @router.get("/")
    async def page(request: Request) -> Response:
        return file_response(request, FIRST, shown[FIRST])

    @router.head("/page/{name}")
    @router.get("/page/{name}")
    async def page_file(request: Request, name: str) -> Response:
        if name not in shown:
            raise HTTPException(404)
        return file_response(request, name, shown[name])

    return router


def page_files() -> dict[str, bytes]:
    """By name, those of a type that the page is made of."""
    found = (files("omnispeech") / "web").iterdir()
    return {file.name: file.read_bytes() for file in found if _suffix(file.name) in TYPES}


def file_response(request: Request, name: str, content: bytes) -> Response:
    """304 without a body if the caller has just this content."""
    tag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[_suffix(name)])


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix
