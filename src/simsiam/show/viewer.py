"""The viewer: a local web page to browse embeddings, search them by image, and see clusters and duplicates."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import shlex
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from simsiam.clusters import Clusters, find_clusters, stored_settings, summary, write_clusters
from simsiam.compute import draw, pick_device, set_threads
from simsiam.config import UserError, as_path, short_name
from simsiam.data.cache import Cache
from simsiam.data.decode import DecodeError, decode
from simsiam.duplicates import find_duplicates
from simsiam.embeddings import read_embeddings
from simsiam.neighbours import top_k
from simsiam.runs import RECIPE, read_kept, write_json
from simsiam.search import by_vectors
from simsiam.show.layout import layout

if TYPE_CHECKING:
    from simsiam.embed import ImageEncoder

ON_MAP, THUMBNAIL, ON_ATLAS, LARGEST = 2000, 192, 48, 1600
"""Images on the map; sides in pixels of a thumbnail and of a picture on the map, and the longest of a full image."""
MAP = "map.json"
_MARKED = 12
UPLOAD = 64 << 20
"""Maximum size of an uploaded image, in bytes."""
HEADERS = [
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
]
"""Headers of every response: pages of other sites may not show what is served here."""

T = TypeVar("T")
K = Annotated[int, Query(ge=1, le=200)]


class Viewer:
    """Computes what the page requests, for the embeddings as they were when read; slow parts are computed once, on
    first use."""

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        folder = as_path(folder)
        if (folder / RECIPE).exists():
            raise UserError(
                f"{folder} is a run. Embed images with it first: simsiam embed {shlex.quote(str(folder))} DATA -o DIR."
            )
        set_threads()
        pick_device(device)  # fail now, not when the page needs it
        self.stored, self.device = read_embeddings(folder, ("id", "class", "pixels")), device
        if not len(self.stored):
            raise UserError(f"{folder} holds no vectors: there is nothing to show.")
        self.ids, self.classes = self.stored.ids, self.stored.items["class"]
        told = json.dumps(self.stored.meta).encode() + self.stored.keys.tobytes()
        self.state = hashlib.blake2b(told, digest_size=8).hexdigest()
        """Part of every URL that contains a row, so that the same row of other embeddings has a different URL."""
        self.names = sorted({name for name in self.classes if name is not None})
        self.pictures: tuple[Cache, NDArray[np.int64]] | None = None
        self.why_none: str | None = None
        try:
            self.pictures = self.stored.images()
        except UserError as error:
            self.why_none = str(error)
        self.on_map = draw(np.arange(len(self.stored)), ON_MAP)
        self._locks: defaultdict[Callable[[Viewer], Any], threading.Lock] = defaultdict(threading.Lock)
        self._made: dict[Callable[[Viewer], Any], Any] = {}

    def once(self, part: Callable[[Viewer], T]) -> T:
        """Return the result of `part`, computed on first use only."""
        with self._locks[part]:
            if part not in self._made:
                self._made[part] = part(self)
            made: T = self._made[part]
            return made

    def about(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "title": short_name(self.stored.meta["data"]),
            "images": len(self.stored),
            "classes": self.names,
            "no_pictures": self.why_none,
        }

    # --- pictures ---

    def thumbnail(self, row: int) -> Image.Image:
        """The image as the encoder receives it, before cropping, at most `THUMBNAIL` pixels high and wide."""
        if self.pictures is None:
            raise HTTPException(404, self.why_none)
        cache, cached = self.pictures
        if not cache.usable(cached[[row]]).all():
            raise HTTPException(404, "The image can no longer be read.")
        pixels, _ = cache.batch(cached[[row]])
        image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        return image

    def original(self, row: int) -> Image.Image:
        """The full image, upright, at most 1,600 pixels high and wide."""
        if self.pictures is None:
            raise HTTPException(404, self.why_none)
        cache, cached = self.pictures
        try:
            image = Image.fromarray(decode(cache.images.read(int(cached[row]))))
        except Exception as error:  # archives and plug-ins may raise anything
            raise HTTPException(404, f"The image can no longer be read: {error}") from None
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        return image

    def atlas(self) -> tuple[bytes, int]:
        """All pictures on the map in a single WebP image, row by row, and its number of columns."""
        columns = int(np.ceil(np.sqrt(len(self.on_map))))
        lines = -(-len(self.on_map) // columns)
        sheet = Image.new("RGBA", (columns * ON_ATLAS, lines * ON_ATLAS))
        if self.pictures is not None:
            cache, cached = self.pictures
            cache.usable(cached[self.on_map])  # all at once: one by one, each would wait for the disk
        for place, row in enumerate(self.on_map.tolist()):
            try:
                small = ImageOps.contain(self.thumbnail(row), (ON_ATLAS, ON_ATLAS))
            except HTTPException:
                continue
            left, top = (place % columns) * ON_ATLAS, (place // columns) * ON_ATLAS
            sheet.paste(small, (left + (ON_ATLAS - small.width) // 2, top + (ON_ATLAS - small.height) // 2))
        return _encoded(sheet, "WEBP", quality=80), columns

    # --- positions and neighbours ---

    def map(self) -> dict[str, Any]:
        """Positions of the images on the map, x and y in [0, 1]; stored in the folder, since t-SNE is slow."""
        place, how = self._kept_layout()
        columns = self.once(Viewer.atlas)[1] if self.pictures is not None else None
        low, high = place.min(0), place.max(0)
        scaled = (place - low) / np.maximum(high - low, 1e-12)
        return {
            "how": how,
            "rows": self.on_map.tolist(),
            "ids": [self.ids[row] for row in self.on_map.tolist()],
            "x": np.round(scaled[:, 0], 4).tolist(),
            "y": np.round(scaled[:, 1], 4).tolist(),
            "classes": [self.classes[row] for row in self.on_map.tolist()],
            "side": ON_ATLAS,
            "columns": columns,
            "aspect": self._aspect(),
        }

    def _aspect(self) -> list[float]:
        """Width / height of every picture on the map, once the atlas has decoded them; 1 if unknown."""
        if self.pictures is None:
            return [1.0] * len(self.on_map)
        cache, cached = self.pictures
        rows = cached[self.on_map]
        height, width = np.maximum(cache.heights[rows], 1), np.maximum(cache.widths[rows], 1)
        aspect: list[float] = np.round(width / height, 3).tolist()
        return aspect

    def _kept_layout(self) -> tuple[NDArray[np.float32], str]:
        path = self.stored.folder / MAP
        key = {name: self.stored.meta.get(name) for name in ("vectors", "encoder", "fingerprint")} | {"on_map": ON_MAP}
        kept = read_kept(path)
        if kept.get("key") == key and np.shape(kept.get("place", ())) == (len(self.on_map), 2):
            return np.array(kept["place"], np.float32), str(kept.get("how"))
        place, how = layout(np.asarray(self.stored.vectors[self.on_map]))
        place = np.round(place, 4)
        with contextlib.suppress(UserError):  # a folder that cannot be written to can still be looked at
            write_json(path, {"key": key, "how": how, "place": place.tolist()})
        return place, how

    def encoder(self) -> ImageEncoder:
        return self.stored.encoder(self.device)

    def near(self, row: int, k: int) -> dict[str, Any]:
        vector = np.asarray(self.stored.vectors[[row]])
        found = [each for each in self._near(vector, k + 1) if each["row"] != row]
        return {**self.item(row), "neighbours": found[:k], "on_map": self._near_on_map(vector)}

    def near_image(self, content: bytes, k: int) -> dict[str, Any]:
        """The neighbours of an image file's content. Raises UserError if it cannot be decoded or the run is missing."""
        encoder = self.once(Viewer.encoder)
        try:
            pixels = decode(content, encoder.preprocessing_.short_side)
        except DecodeError as error:
            raise UserError(f"This is not a readable image: {error}.") from None
        vector = encoder.embed([pixels])
        return {"neighbours": self._near(vector, k), "on_map": self._near_on_map(vector)}

    def _near(self, vectors: NDArray[np.float32], k: int) -> list[dict[str, Any]]:
        scores, found = by_vectors(self.stored, vectors, k, device=self.device)
        return [
            {**self.item(row), "score": round(score, 4)}
            for row, score in zip(found[0].tolist(), scores[0].tolist(), strict=True)
        ]

    def _near_on_map(self, vector: NDArray[np.float32]) -> list[int]:
        """The images on the map most similar to the vector, which show where it would be."""
        _, found = top_k(vector, np.asarray(self.stored.vectors[self.on_map]), _MARKED)
        return self.on_map[found[0].numpy()].tolist()

    def item(self, row: int) -> dict[str, Any]:
        return {"row": row, "id": self.ids[row], "class": self.classes[row]}

    def images(self, start: int, count: int, text: str, kind: str | None, cluster: int | None) -> dict[str, Any]:
        """A page of the images whose id contains `text`, optionally of one class or cluster."""
        rows: Any = range(len(self.ids))
        if cluster is not None:
            found = self.once(Viewer.clusters)[1]
            rows = np.flatnonzero(found.label == cluster)
            rows = rows[np.argsort(-found.similarity[rows], kind="stable")].tolist()
        if text or kind is not None:
            text = text.lower()
            rows = [
                row for row in rows if text in self.ids[row].lower() and (kind is None or self.classes[row] == kind)
            ]
        return {"total": len(rows), "items": [self.item(row) for row in rows[start : start + count]]}

    # --- clusters and duplicates ---

    def clusters(self) -> tuple[dict[str, Any], Clusters]:
        """What `clusters.summary` returns, with images in place of rows, and the arrays that it summarises."""
        # With the settings of the last `simsiam clusters`, because its file is rewritten.
        asked = stored_settings(self.stored)
        found = find_clusters(self.stored, asked.get("count"), seed=asked.get("seed", 0), device=self.device)
        with contextlib.suppress(UserError):  # a folder that cannot be written to can still be looked at
            write_clusters(self.stored, found)
        about = summary(self.stored, found)
        for each in about["clusters"]:
            each["examples"] = [self.item(row) for row in each["examples"]]
        about["odd"] = [{**self.item(each["row"]), "score": each["similarity"]} for each in about["odd"]]
        return about | {"on_map": found.label[self.on_map].tolist()}, found

    def duplicates(self) -> dict[str, Any]:
        found = find_duplicates(self.stored, device=self.device)
        return {**found, "groups": [[each | self.item(each["row"]) for each in group] for group in found["groups"]]}


class _Latest:
    """The viewer of a folder's current embeddings; while these are being written, of the previous ones."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer, self._lock = viewer, threading.Lock()

    def __call__(self) -> Viewer:
        with self._lock:
            if self._viewer.stored.replaced():
                with contextlib.suppress(UserError):
                    self._viewer = Viewer(self._viewer.stored.folder, self._viewer.device)
            return self._viewer


def _latest(request: Request) -> Viewer:
    viewer: Viewer = request.app.state.latest()
    return viewer


def _same(state: str, latest: Annotated[Viewer, Depends(_latest)]) -> Viewer:
    if state != latest.state:
        raise HTTPException(410, "The embeddings have changed: reload the page.")
    return latest


def _from_here(request: Request) -> None:
    """Reject requests from pages of other sites; programs other than browsers send no origin and are accepted."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "Only the viewer's own page may send this request.")


Latest = Annotated[Viewer, Depends(_latest)]
Same = Annotated[Viewer, Depends(_same)]


def build_app(viewer: Viewer, hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> FastAPI:
    """Build the app that serves the page and its requests. Requests for a host not in `hosts` are refused: another site
    could otherwise point its own domain here and read the images.

    After `simsiam embed` has updated the folder, requests with an earlier `Viewer.state` get 410 (Gone).
    """
    app = FastAPI(title="simsiam", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.latest = _Latest(viewer)
    app.add_middleware(GZipMiddleware, minimum_size=2000)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    kept = {"Cache-Control": "private, max-age=31536000, immutable"}

    def known(viewer: Viewer, row: int) -> int:
        if not 0 <= row < len(viewer.ids):
            raise HTTPException(404, "There is no such image.")
        return row

    @app.exception_handler(UserError)
    def explained(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")

    @app.get("/about")
    def about(viewer: Latest) -> dict[str, Any]:
        return viewer.about()

    @app.get("/{state}/map")
    def map_(viewer: Same) -> dict[str, Any]:
        return viewer.once(Viewer.map)

    @app.get("/{state}/atlas")
    def atlas(viewer: Same) -> Response:
        return Response(viewer.once(Viewer.atlas)[0], media_type="image/webp")

    @app.get("/{state}/images")
    def images(
        viewer: Same,
        start: Annotated[int, Query(ge=0)] = 0,
        count: Annotated[int, Query(ge=1, le=500)] = 90,
        text: str = "",
        kind: Annotated[str | None, Query(alias="class")] = None,
        cluster: int | None = None,
    ) -> dict[str, Any]:
        return viewer.images(start, count, text, kind, cluster)

    @app.get("/{state}/near/{row}")
    def near(viewer: Same, row: int, k: K = 36) -> dict[str, Any]:
        return viewer.near(known(viewer, row), k)

    @app.post("/{state}/near", dependencies=[Depends(_from_here)])
    async def near_image(viewer: Same, request: Request, k: K = 36) -> dict[str, Any]:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > UPLOAD:
                raise HTTPException(413, f"The file is larger than {UPLOAD >> 20} MB.")
        return await run_in_threadpool(viewer.near_image, bytes(content), k)

    @app.get("/{state}/clusters")
    def clusters(viewer: Same) -> dict[str, Any]:
        return viewer.once(Viewer.clusters)[0]

    @app.get("/{state}/duplicates")
    def duplicates(viewer: Same) -> dict[str, Any]:
        return viewer.once(Viewer.duplicates)

    @app.get("/{state}/picture/{row}")
    def picture(viewer: Same, row: int) -> Response:
        image = viewer.thumbnail(known(viewer, row))
        small = max(image.size) <= 64  # lossless, as single pixels show
        content = _encoded(image, "PNG") if small else _encoded(image, "JPEG", quality=88)
        return Response(content, media_type="image/png" if small else "image/jpeg", headers=kept)

    @app.get("/{state}/original/{row}")
    def original(viewer: Same, row: int) -> Response:
        content = _encoded(viewer.original(known(viewer, row)), "PNG")
        return Response(content, media_type="image/png", headers={"Cache-Control": "no-store"})  # the file may change

    return app


def serve(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the viewer until interrupted. `ready` receives the URL once the server is listening.

    Raises UserError if the folder holds no embeddings or the address is not available.
    """
    import socket

    import uvicorn

    viewer = Viewer(folder, device)
    local = host in ("127.0.0.1", "localhost", "::1")
    # Older versions of starlette (such as 1.6) parse "[" as the host of "[::1]:8000". Only an IP address starts like
    # this, and another site cannot point that here.
    app = build_app(viewer, ("localhost", "127.0.0.1", "[::1]", "[") if local else ("*",))
    try:
        sockets = [socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)]
    except OSError as error:
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise UserError(f"Cannot listen on {host}:{port} ({reason}): choose another {other}.") from None
    with contextlib.closing(sockets[0]):
        shown = f"[{host}]" if ":" in host else host
        if ready is not None:
            ready(f"http://{shown}:{sockets[0].getsockname()[1]}/")
        config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1, headers=HEADERS)
        server = uvicorn.Server(config)
        logging.getLogger("uvicorn.error").addFilter(
            lambda _: not server.should_exit
        )  # that it cancels what still runs
        with contextlib.suppress(KeyboardInterrupt):  # the normal way to stop the viewer
            server.run(sockets)


def _encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()
