"""CIFAR-10 on small files in its format, from a folder and through a server of this process."""

import hashlib
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from pipeline.config import Cifar10, load_study
from pipeline.data import cifar10, load_data, needs_download
from pipeline.errors import InputError, MissingError
from pipeline.plan import check_start, plan_study


def scaled(image, by, axes):
    """In float64 and in one go, where the loader counts in whole numbers."""
    known = by.astype(np.float64)
    return (image - known.mean(axes, keepdims=True)[0]) / known.std(axes, keepdims=True)[0]


# --- what is chosen and how it is prepared ---------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "n"), [(2, 10), (4, 24), (10, 150)])
@pytest.mark.parametrize(("normalise", "axes"), [("channel", (0, 2, 3)), ("pixel", 0)])
def test_the_first_of_each_class(images, classes, n, normalise, axes):
    _, label, image = images
    label, image = label[:5].reshape(-1), image[:5].reshape(-1, 3, 32, 32)
    rows = [i for one in range(classes) for i in [i for i in range(150) if label[i] == one][: n // classes]]
    data = load_data(Cifar10(classes=classes, n=n, normalise=normalise), 0)
    np.testing.assert_array_equal(data.sample_index, rows)
    np.testing.assert_allclose(data.x, scaled(image[rows], image, axes), atol=1e-12)
    expected = [
        [2 * int(label[i]) - 1] if classes == 2 else [float(label[i] == k) for k in range(classes)] for i in rows
    ]
    np.testing.assert_array_equal(data.y, expected)


@pytest.mark.parametrize(("classes", "n"), [(2, 7), (10, 41)])
def test_the_first_of_all(images, classes, n):
    _, label, image = images
    label, image = label[:5].reshape(-1), image[:5].reshape(-1, 3, 32, 32)
    rows = [i for i in range(150) if label[i] < classes][:n]
    data = load_data(Cifar10(classes=classes, n=n, choice="first", normalise="pixel"), 0)
    np.testing.assert_array_equal(data.sample_index, rows)
    np.testing.assert_allclose(data.x, scaled(image[rows], image, 0), atol=1e-12)


@pytest.mark.parametrize(("normalise", "axes"), [("channel", (0, 2, 3)), ("pixel", 0)])
def test_the_rest_is_the_test_set_seen_as_the_training_set_is(images, normalise, axes):
    _, label, image = images
    rows = [i for i in range(30) if label[5][i] < 4]
    data = load_data(Cifar10(classes=4, n=8, normalise=normalise), 0, rest=True)
    np.testing.assert_array_equal(data.sample_index, np.array(rows) + 150)
    np.testing.assert_allclose(data.x, scaled(image[5][rows], image[:5].reshape(-1, 3, 32, 32), axes), atol=1e-12)
    np.testing.assert_array_equal(data.y.argmax(1), label[5][rows])


# --- a folder that cannot be used ------------------------------------------------------------------------------------


def refused(error, said, table=None, rest=False):
    with pytest.raises(error, match=said) as caught:
        load_data(table or Cifar10(n=4), 0, rest)
    assert "\n" not in str(caught.value)


def test_more_images_than_there_are(images):
    refused(InputError, r"data\.n = 32: the files give 30 images of the first 2 classes", Cifar10(n=32))
    refused(InputError, r"data\.n = 151: the files give 150 images", Cifar10(n=151, classes=10, choice="first"))


@pytest.mark.parametrize("keep", [0, 1, 3072, 30 * 3073 - 1])
def test_a_file_that_was_cut_off(images, keep):
    path = images[0] / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:keep])
    refused(InputError, rf"data_batch_2\.bin: {keep} bytes are not whole records of 3073: it was cut off")


def test_a_label_that_is_none(images):
    path = images[0] / "data_batch_3.bin"
    content = bytearray(path.read_bytes())
    content[7 * 3073] = 10
    path.write_bytes(content)
    refused(InputError, r"data_batch_3\.bin: record 7 has label 10, must be 0 to 9")


def test_files_and_folders_that_are_not_there(images, tmp_path, monkeypatch):
    (images[0] / "test_batch.bin").unlink()
    load_data(Cifar10(n=4), 0)  # training needs no test set
    refused(MissingError, "NTK_EOS_CIFAR10 = .*: there is no test_batch.bin; it must have data_batch_1.bin,", rest=True)
    monkeypatch.setenv("NTK_EOS_CIFAR10", str(tmp_path / "none"))
    refused(MissingError, "NTK_EOS_CIFAR10 = .*none: there is no data_batch_1.bin")
    assert not needs_download(Cifar10())


def test_a_folder_in_the_place_of_a_file(images):
    (images[0] / "data_batch_1.bin").unlink()
    (images[0] / "data_batch_1.bin").mkdir()
    refused(InputError, "cannot be read .*Is a directory")


@pytest.mark.parametrize(("normalise", "axis"), [("pixel", (0, 17, 5)), ("channel", (0,))])
def test_what_never_changes_has_no_deviation(images, normalise, axis):
    for path in images[0].iterdir():
        records = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 3073).copy()
        records[:, 1:].reshape(-1, 3, 32, 32)[:, *axis] = 137
        path.write_bytes(records.tobytes())
    refused(InputError, f"a {normalise} is the same in all training images", Cifar10(n=4, normalise=normalise))


# --- the archive -----------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(images, tmp_path, monkeypatch):
    """The files as an archive that is taken for the official one, and no server that has it."""
    path = tmp_path / "served" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as opened:
        opened.add(images[0], "cifar-10-batches-bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NTK_EOS_CIFAR10")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")  # port 9 discards
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=path.parent)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{server.server_port}/{path.name}")
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("rest", [False, True])
def test_the_archive_is_fetched_once_and_gives_what_its_files_give(images, archive, monkeypatch, rest):
    table = Cifar10(n=20, classes=10)
    assert needs_download(table)
    with served(archive, monkeypatch):
        fetched = load_data(table, 0, rest)
    assert not needs_download(table)
    assert load_data(table, 0, rest).digest == fetched.digest  # the server is gone
    monkeypatch.setenv("NTK_EOS_CIFAR10", str(images[0]))
    assert load_data(table, 0, rest).digest == fetched.digest


def test_an_archive_of_another_hash_is_not_taken(archive, monkeypatch):
    monkeypatch.setattr(cifar10, "SHA256", 64 * "0")
    with served(archive, monkeypatch):
        refused(InputError, "cannot be fetched from http.*does not match the known hash.*put the archive at data/downl")
    assert needs_download(Cifar10())
    cifar10.ARCHIVE.write_bytes(archive.read_bytes())
    refused(InputError, r"cifar-10-binary\.tar\.gz: its SHA-256 is \w{16}\.\.\., not 0000000000000000\.\.\.: remove it")


def test_without_a_network_one_line_says_what_to_do(archive):
    refused(
        InputError, "CIFAR-10 cannot be fetched from http.*; put the archive at .*or name a folder .*NTK_EOS_CIFAR10"
    )


def test_an_archive_without_a_file_and_one_that_is_cut_off(images, archive, monkeypatch):
    cifar10.ARCHIVE.parent.mkdir(parents=True)
    with tarfile.open(cifar10.ARCHIVE, "w:gz") as opened:
        opened.add(images[0] / "data_batch_1.bin")
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(cifar10.ARCHIVE.read_bytes()).hexdigest())
    refused(MissingError, r"cifar-10-binary\.tar\.gz: there is no data_batch_2\.bin")
    cifar10.ARCHIVE.write_bytes(archive.read_bytes()[:5000])
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(cifar10.ARCHIVE.read_bytes()).hexdigest())
    refused(InputError, r"cifar-10-binary\.tar\.gz: cannot be read \(.*\); get it again")


def test_a_plan_fetches_nothing_and_a_start_does_so_once(archive, monkeypatch):
    study = load_study("smoke", ["data.name=cifar10", "data.n=20"])
    plan = plan_study(study, "nowhere", 1)  # no server answers
    assert plan.seconds is None
    assert [run.samples for run in plan.runs] == [20, 20]
    with pytest.raises(InputError, match="cannot be fetched"):
        check_start(plan.runs)
    with served(archive, monkeypatch):
        check_start(plan.runs)
    assert cifar10.ARCHIVE.exists()
