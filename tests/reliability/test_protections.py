"""What only a mutation of the source showed to be untested."""

import threading

from writer_loop import advance, open_writer

from pipeline.disk import Directory


def test_whoever_waits_for_a_lease_gets_it_after_its_holder_and_not_before(tmp_path):
    got = []
    with Directory(tmp_path).lease(".lock", b"first"):
        waiting = threading.Thread(target=lambda: got.append(Directory(tmp_path).lease(".lock", b"second", wait=True)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert (tmp_path / ".lock").read_bytes() == b"first"
    waiting.join()
    assert (tmp_path / ".lock").read_bytes() == b"second"
    got[0].release()


def test_whoever_takes_a_run_up_removes_what_was_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    with open_writer(tmp_path) as writer:
        advance(writer, 2)
        path = writer.directory.path
    left = [path / ".tmp-1", path / "train" / "loss" / ".tmp-2"]
    for file in left:
        file.write_bytes(b"half")
    open_writer(tmp_path).close()
    assert not any(file.exists() for file in left)
