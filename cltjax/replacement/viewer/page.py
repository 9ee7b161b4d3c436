"""A graph as one HTML file that holds all it shows, and a loopback server for a folder of them. Imports no torch.

Tokens, prompts and labels come from data sets and vocabularies: nothing of them may run. They reach the page as JSON
in which `<`, `>` and `&` are escaped, its scripts show them as text, and a content security policy allows only the
scripts of this package, by their hash, and no request.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from cltjax.errors import UserError
from cltjax.files import write_whole

PAGE, GRAPH = "index.html", "graph.json"  # the files of a graph's folder that are served
HOSTS = ("127.0.0.1", "localhost", "[::1]")  # what a browser on this machine calls the server
Json = Mapping[str, Any]


def graph_page(data: Json) -> str:
    """The HTML page of a graph: `data` is the content of graph.json. ValueError where a figure is not finite."""
    title = str(data["metadata"].get("slug") or "Attribution graph")
    scripts = ("panel.js", "graph_model.js", "graph_draw.js", "graph.js")
    return assemble("graph.html", title, ("panel.css", "graph.css"), scripts, data)


def write_page(data: Json, folder: Path) -> None:
    """Write graph.json and, when that is whole, index.html into `folder`, which is made where it is missing."""
    page, text = graph_page(data), json.dumps(data, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / GRAPH, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_whole(folder / PAGE, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def static(name: str) -> str:
    """The text of a static part of the pages."""
    return files("cltjax.replacement.viewer").joinpath(name).read_text(encoding="utf-8")


def assemble(template: str, title: str, styles: Sequence[str], scripts: Sequence[str], data: Json) -> str:
    """One HTML file of static parts and `data`, which scripts find as JSON in the element with the id `data`.

    `template`, `styles` and `scripts` name files of this folder. The template says where things go by the comments
    policy, title, styles, data and scripts.
    """
    code = [static(name) for name in scripts]
    parts = {
        "policy": policy(code),
        "title": escape(title),
        "styles": "\n".join(f"<style>\n{static(name)}</style>" for name in styles),
        "data": f'<script type="application/json" id="data">{inert_json(data)}</script>',
        "scripts": "\n".join(f"<script>{text}</script>" for text in code),
    }
    # In one pass: a comment inside the data or a title stays what it is.
    return re.sub(r"<!--(\w+)-->", lambda found: parts[found[1]], static(template))


def policy(scripts: Sequence[str]) -> str:
    """A content security policy that allows these inline scripts, inline styles, data: images, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    )


def inert_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in: ASCII, without `<`, `>` and `&`."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def graph_folders(folder: Path) -> dict[str, Path]:
    """The graphs in `folder` by name: its subfolders that hold a page, or itself. UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name one that `cltjax graph --out` wrote into")
    candidates = [folder.resolve(), *sorted(path for path in folder.iterdir() if not path.name.startswith("."))]
    found = {path.name: path for path in candidates if (path / PAGE).is_file() and (path / GRAPH).is_file()}
    if not found:
        raise UserError(f"{folder} holds no graphs: write one with cltjax graph --out {folder / 'NAME'}")
    return found


def metadata(path: Path) -> Json | None:
    """A graph's metadata; None where its graph.json cannot be read."""
    try:
        state = path.stat()
        return read_metadata(path, state.st_mtime_ns, state.st_size)
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or just being replaced: listed as such
        return None


@lru_cache(maxsize=4096)
def read_metadata(path: Path, _modified: int, _size: int) -> Json:
    """Of a file in one state: a listing of many large graphs reads each once."""
    found = json.loads(path.read_bytes())["metadata"]
    return {**found, "cltjax": dict(found.get("cltjax") or {})}


def listing(folder: Path) -> str:
    """The HTML page that lists the graphs in a folder: title, prompt, answer and scores, with links."""
    rows = []
    for name, path in graph_folders(folder).items():
        about = metadata(path / GRAPH)
        link = f'<a href="/{quote(name, safe="")}/">{escape(str((about or {}).get("slug") or name))}</a>'
        if about is None:
            rows.append(f'<tr><td>{link}</td><td colspan="3">{GRAPH} is damaged</td></tr>')
            continue
        scores = about["cltjax"].get("scores") or {}
        figures = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in scores.items())
        # An image is hundreds of the same token.
        prompt = re.sub(r"(<[^<>\s]{1,40}>|\[IMG\])\1{2,}", shortened, str(about.get("prompt", "")))
        cells = [prompt, str(about["cltjax"].get("answer", "")), figures]
        rows.append(f"<tr><td>{link}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy(())}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<title>Attribution graphs</title><style>{static("graph.css")}</style></head>
<body class="listing"><h1>Attribution graphs</h1><div class="table"><table>
<thead><tr><th>Graph</th><th>Prompt</th><th>Answer</th><th>Scores</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div></body></html>
"""


def shortened(run: re.Match[str]) -> str:
    """A token and how many times it stands there."""
    return f"{run[1]}×{len(run[0]) // len(run[1])}"


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for the listing and for the two files of each listed graph; names are looked up."""

    def __init__(self, *args: Any, folder: Path, **options: Any) -> None:
        self.folder = folder
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        # Another site's name that points at this machine (DNS rebinding) is not let in.
        if re.sub(r":\d*$", "", self.headers.get("Host", "")) not in HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        try:
            graphs = graph_folders(self.folder)
        except UserError as error:
            self.send_error(HTTPStatus.NOT_FOUND, explain=str(error))
            return
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            self.answer("text/html", listing(self.folder).encode())
            return
        _, name, *rest = path.split("/")
        if name in graphs and not rest:
            self.send_response(HTTPStatus.MOVED_PERMANENTLY)
            self.send_header("Location", f"/{quote(name, safe='')}/")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name in graphs and rest in ([""], [PAGE]):
            self.answer("text/html", (graphs[name] / PAGE).read_bytes())
        elif name in graphs and rest == [GRAPH]:
            self.answer("application/json", (graphs[name] / GRAPH).read_bytes())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, kind: str, content: bytes) -> None:
        """Send a file; without its content where only the head was asked for."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")  # a graph written again shows at once
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Requests are not printed."""


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 for the graphs in `folder`; port 0 is any free one.

    UserError where the folder has no graphs or the port cannot be had.
    """
    graph_folders(folder)
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, folder=folder))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} cannot be used ({error}): name another with --port, 0 for any free one"
        ) from error


def serve(folder: Path, port: int) -> None:
    """Serve the graphs in `folder` to browsers on this machine until interrupted; prints the address."""
    with make_server(folder, port) as server:
        graphs = list(graph_folders(folder))
        where = f"http://127.0.0.1:{server.server_port}/" + (
            f"{quote(graphs[0], safe='')}/" if len(graphs) == 1 else ""
        )
        print(f"{where}  ({len(graphs)} graph{'s' * (len(graphs) != 1)}; Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
