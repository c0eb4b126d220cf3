"""An S3 server on loopback, of moto, that ends with its standard input; run by the environment .venv-moto.

Prints its port. PERCENT of the requests are answered by an error: half of these before they are done, half after.

python tests/reliability/s3_server.py PERCENT
"""

import random
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        """Say nothing."""


def main(percent: str) -> None:
    moto, dice = DomainDispatcherApplication(create_backend_app), random.Random(0)

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        struck = dice.uniform(0, 100) < float(percent) and environ["PATH_INFO"].count("/") > 1
        if struck and dice.random() < 0.5:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        if not struck:
            return moto(environ, start)
        for _ in moto(environ, lambda *_: None):
            pass
        start("500 Internal Server Error", [("Content-Length", "0")])
        return [b""]

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
