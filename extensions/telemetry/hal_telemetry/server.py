"""A small HTTP server: /metrics for Prometheus, /calls for `hal top`, /trace for Perfetto."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hal_core import ContractError

from . import metrics, timeline
from .recorder import snapshot


class _Handler(BaseHTTPRequestHandler):
    """Answers with what was recorded; whoever may connect may read it."""

    def do_GET(self) -> None:
        answers = {
            "/metrics": ("text/plain; version=0.0.4; charset=utf-8", metrics.metrics_text),
            "/calls": ("application/json", lambda: json.dumps(snapshot())),
            "/trace": ("application/json", lambda: json.dumps(timeline.events())),
        }
        found = answers.get(self.path.partition("?")[0])
        body = "there are /metrics, /calls and /trace\n" if found is None else found[1]()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "text/plain" if found is None else found[0])
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a scrape each second is no news."""


def serve(host: str, port: int) -> ThreadingHTTPServer:
    """A server in a daemon thread. Raises ContractError where the port cannot be had."""
    try:
        server = ThreadingHTTPServer((host, port), _Handler)
    except (OSError, OverflowError) as error:
        raise ContractError(
            f"metrics cannot be served at {host}:{port} ({error}): pass another port, or 0 for a free one"
        ) from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), name="hal-telemetry", daemon=True).start()
    return server
