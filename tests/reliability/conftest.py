"""An S3 server on loopback, for the tests that need one."""

import subprocess
import urllib.request
from pathlib import Path

import pytest

from pipeline import objects

SERVER_PYTHON = Path(__file__).parents[2] / ".venv-moto" / "bin" / "python"


@pytest.fixture
def server(request, monkeypatch):
    """An S3 server with an empty bucket; by parameter, the percentage of requests that fail."""
    if not SERVER_PYTHON.exists():
        pytest.skip("`make reliability` installs the server into .venv-moto")
    command = [SERVER_PYTHON, Path(__file__).with_name("s3_server.py"), str(getattr(request, "param", 0))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        for name, value in {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "REGION": "us-east-1",
                            "ENDPOINT": endpoint, "ALLOW_HTTP": "true"}.items():  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
        objects.client.cache_clear()
        yield
        objects.client.cache_clear()
        process.stdin.close()
        assert process.wait(10) == 0
