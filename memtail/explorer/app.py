"""Application of the explorer: its URLs, each a page, an image or a CSV file. Requests change nothing but the session of a browser."""

from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException

from memtail.errors import MemtailError
from memtail.execution.progress import ExperimentProgress
from memtail.explorer import views
from memtail.explorer.access import LOGOUT, REPORT_POLICY, guard
from memtail.explorer.library import Library
from memtail.explorer.opened import Opened
from memtail.explorer.score_cache import BeingReadError, NotPublishedError
from memtail.explorer.selection import BY_HELD_OUT, QueryError, Selection, histogram, orders
from memtail.figures.numbers import fixed, general, percent
from memtail.figures.thumbnails import png
from memtail.report.pointer import ReportPointer
from memtail.storage import ObjectNotFound, ObjectStore
from memtail.studies.result import StudyResult

# Images are cached for a day: their URL holds the fingerprint of the dataset.
_IMAGE_AGE = "private, max-age=86400"
# Features on the page of an example, and in a row of a list.
_MOST_FEATURES, _FEATURES_IN_ROW = 100, 8
_TYPES = {"html": "text/html; charset=utf-8", "svg": "image/svg+xml", "png": "image/png"}

# Columns of `/experiments.csv`, from `ExperimentProgress.to_json`.
_OVERVIEW = (
    "experiment",
    "state",
    "ending",
    "trials",
    "wanted",
    "failed_attempts",
    "published_trials",
    "published",
    "outcome",
    "standard_error",
    "test_accuracy",
    "test_accuracy_se",
)

Split = Literal["train", "test"]


def create(store: ObjectStore, token: str | None = None, log_requests: bool = False) -> FastAPI:
    """Make the application.

    Args:
        store: the store whose experiments are shown.
        token: the access token (see `memtail.explorer.access`).
        log_requests: whether to log each request.
    """
    app = FastAPI(title="memtail", openapi_url=None, redirect_slashes=False)
    get = partial(app.api_route, methods=["GET", "HEAD"])
    library, pages = Library(store), _Pages(sign_out=LOGOUT if token else None)
    app.mount("/static", StaticFiles(packages=[("memtail.explorer", "static")]))
    guard(app, token, pages.error, log_requests)

    @get("/")
    def experiments() -> Response:
        def read(name: str) -> tuple[ExperimentProgress, ReportPointer | None, list[StudyResult]]:
            return library.progress(name), library.report(name), library.studies(name)

        readable, damaged = library.read_each(read)
        own = [
            (*readable[name], [readable[each][0] for each in trained if each in readable])
            for name, trained in library.own_names().items()
            if name in readable
        ]
        return pages.page("experiments.html", experiments=own, damaged=damaged, address=library.address)

    @get("/experiments.csv")
    def experiments_csv() -> Response:
        readable, damaged = library.read_each(library.progress)
        rows = [progress.to_json() for progress in readable.values()]
        columns = {column: [row[column] for row in rows] for column in _OVERVIEW}
        names = [line.partition(":")[0] for line in damaged]
        return _csv("experiments", views.csv(columns, {"experiment": names, "state": ["damaged"] * len(names)}))

    @get("/experiments/{name}")
    def gallery(name: str, request: Request) -> Response:
        progress, selection = library.progress(name), Selection.of(request.query_params)
        try:
            opened = library.open(name)
        except NotPublishedError:
            return pages.page("waiting.html", progress=progress, reading=False)
        except BeingReadError:
            return pages.page("waiting.html", progress=progress, reading=True)
        return pages.page(
            "gallery.html",
            opened=opened,
            progress=progress,
            report=library.report(name),
            studies=library.studies(name),
            selection=selection,
            gallery=views.gallery(opened, selection),
            bars=histogram(opened.memorization, opened.scores.names, opened.lower_files, selection),
            orders={key: label for key, label in orders(opened.scores.names).items() if key != "class" or opened.classes},
            by_held_out=selection.sort in BY_HELD_OUT,
        )

    @get("/experiments/{name}/train.csv")
    def gallery_csv(name: str, request: Request) -> Response:
        return _csv(f"{name}-train", views.gallery_csv(library.open(name), Selection.of(request.query_params)))

    @get("/experiments/{name}/train/{index}.csv")
    def train_csv(name: str, index: int) -> Response:
        opened = library.open(name)
        return _csv(f"{name}-train-{index}", views.influenced_csv(opened, _check_index(opened, "train", index)))

    @get("/experiments/{name}/test/{index}.csv")
    def test_csv(name: str, index: int) -> Response:
        opened = library.open(name)
        return _csv(f"{name}-test-{index}", views.influencers_csv(opened, _check_index(opened, "test", index)))

    @get("/experiments/{name}/train/{index}")
    def train(name: str, index: int, request: Request) -> Response:
        opened, selection = library.open(name), Selection.of(request.query_params)
        _check_index(opened, "train", index)
        return pages.page("train.html", opened=opened, selection=selection, **views.train_example(opened, index, selection))

    @get("/experiments/{name}/test/{index}")
    def test(name: str, index: int) -> Response:
        opened = library.open(name)
        _check_index(opened, "test", index)
        return pages.page("test.html", opened=opened, **views.test_example(opened, index))

    @get("/experiments/{name}/images/{split}/{index}.png")
    def image(name: str, split: Split, index: int) -> Response:
        opened = library.open(name)
        _check_index(opened, split, index)
        if opened.dataset is None:
            raise HTTPException(404, opened.missing)
        image = opened.dataset.preview(split, index)
        if isinstance(image, str | tuple):
            raise HTTPException(404, f"experiment '{name}' has {opened.dataset.kind}, and no images")
        return Response(png(image), media_type="image/png", headers={"Cache-Control": _IMAGE_AGE})

    @get("/experiments/{name}/studies")
    def studies(name: str) -> Response:
        return pages.page("studies.html", name=name, progress=library.progress(name), studies=library.studies(name))

    @get("/experiments/{name}/studies/{study}.svg")
    def figure(name: str, study: str) -> Response:
        return Response(_study(name, study).figure_svg(), media_type=_TYPES["svg"], headers={"Content-Security-Policy": REPORT_POLICY})

    @get("/experiments/{name}/studies/{study}.csv")
    def study_csv(name: str, study: str) -> Response:
        return _csv(f"{name}-{study}", views.csv(_study(name, study).table()))

    @get("/experiments/{name}/report/{file}")
    def report(name: str, file: str) -> Response:
        kind = _TYPES.get(file.rpartition(".")[2])
        if kind is None:
            raise HTTPException(404, f"the report has no file {file}")
        return Response(library.report_file(name, file), media_type=kind, headers={"Content-Security-Policy": REPORT_POLICY})

    def _study(name: str, study: str) -> StudyResult:
        for result in library.studies(name):
            if result.study == study:
                return result
        raise HTTPException(404, f"experiment '{name}' has no study '{study}'")

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        return pages.error(request, error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    def unknown(request: Request, error: RequestValidationError) -> Response:
        del error
        return pages.error(request, 404, f"there is no page at {request.url.path[:100]}")

    @app.exception_handler(MemtailError)
    def failed(request: Request, error: MemtailError) -> Response:
        status = 400 if isinstance(error, QueryError) else 404 if isinstance(error, ObjectNotFound | NotPublishedError) else 503
        return pages.error(request, status, str(error))

    return app


class _Pages:
    """The templates, with the filters and values that all of them use.

    Args:
        sign_out: path of the request that ends a session, if there are sessions.
    """

    def __init__(self, sign_out: str | None) -> None:
        self._templates = Environment(
            loader=PackageLoader("memtail.explorer"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.filters |= {"decimal": fixed, "general": general, "percent": percent, "moment": _moment}
        self._templates.globals |= {
            "MOST_FEATURES": _MOST_FEATURES,
            "FEATURES_IN_ROW": _FEATURES_IN_ROW,
            "release": version("memtail"),
            "SIGN_OUT": sign_out,
        }

    def page(self, template: str, code: int = 200, **values: Any) -> Response:
        """Render a page."""
        return Response(self._templates.get_template(template).render(values), code, media_type="text/html; charset=utf-8")

    def error(self, request: Request, status: int, line: str) -> Response:
        """Render the page of an error; with status 401 it has a form for the token."""
        response = self.page("error.html", status, status=status, line=line)
        if status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response


def _check_index(opened: Opened, split: Split, index: int) -> int:
    count = opened.scores.summary.n_train if split == "train" else opened.scores.summary.n_test
    if not 0 <= index < count:
        raise HTTPException(404, f"there is no {split} example {index}: there are {count:,}, from 0")
    return index


def _csv(name: str, data: bytes) -> Response:
    return Response(data, media_type="text/csv; charset=utf-8", headers={"Content-Disposition": f'attachment; filename="{name}.csv"'})


def _moment(published: str) -> str:
    return f"{datetime.fromisoformat(published).astimezone(UTC):%d %b %Y, %H:%M} UTC"
