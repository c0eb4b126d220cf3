import pytest
from study_files import MINIMAL

from pipeline.config import load_study


@pytest.fixture
def study(tmp_path):
    """Writes a study file and loads it."""

    def load(text=MINIMAL, *overrides):
        path = tmp_path / "study.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_study(path, overrides)

    return load
