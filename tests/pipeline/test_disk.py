import fcntl
import os
import re
import subprocess
import sys

import pytest

from pipeline.disk import TEMPORARY, Directory
from pipeline.errors import DamagedStore, InputError, MissingError, RunLocked


@pytest.fixture
def directory(tmp_path):
    return Directory(tmp_path)


def everything(directory):
    return sorted(directory.list(hidden=True))


# --- files -----------------------------------------------------------------------------------------------------------


def test_put_get_exists_size_list_delete(directory):
    directory.put("a/b/c.0", b"one")
    directory.put("a/b/c.0", b"three")
    directory.put("a/z", b"")
    directory.put("top", b"2")
    assert directory.get("a/b/c.0") == b"three"
    assert (directory.size("a/b/c.0"), directory.size("a/z"), directory.size("a/none")) == (5, 0, None)
    assert list(directory.list()) == ["top", "a/z", "a/b/c.0"]
    assert list(directory.list("a/b")) == ["a/b/c.0"]
    assert directory.exists("a/b")
    directory.delete("a/b")
    directory.delete("a/z")
    directory.delete("never/there")
    assert list(directory.list()) == ["top"]
    assert not directory.exists("a/b")


def test_hidden_files_are_listed_only_if_asked_for(directory):
    directory.put(".hidden", b"")
    directory.put(".new-1/x", b"")
    directory.put("seen", b"")
    assert list(directory.list()) == ["seen"]
    assert everything(directory) == [".hidden", ".new-1/x", "seen"]


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a/", "a\0b"])
@pytest.mark.parametrize("operation", ["put", "get", "exists", "size", "delete", "lease", "leased"])
def test_a_key_that_could_leave_the_folder_is_refused(directory, operation, key):
    further = {"put": [b"x"], "lease": [b"x"]}.get(operation, [])
    with pytest.raises(InputError, match="must be a relative path"):
        getattr(directory, operation)(key, *further)
    assert everything(directory) == []


def test_get_says_what_it_cannot_read(directory):
    directory.put("a", b"12345")
    with pytest.raises(MissingError, match="b does not exist"):
        directory.get("b")
    with pytest.raises(MissingError, match="does not exist"):
        directory.get("a/below-a-file")
    with pytest.raises(InputError, match="has 5 bytes, more than the 4 allowed"):
        directory.get("a", limit=4)
    assert directory.get("a", limit=5) == b"12345"
    directory.make()
    (directory.path / "folder").mkdir()
    os.mkfifo(directory.path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(InputError, match=f"{name} is not a file"):
            directory.get(name)


def test_no_key_leads_through_a_symbolic_link(directory, tmp_path):
    directory.make()
    (tmp_path / "secret").write_bytes(b"secret")
    for name, target in {"link": "secret", "folder": ".", "dangling": "nothing"}.items():
        (directory.path / name).symlink_to(tmp_path / target)
    for key in ("link", "folder/secret", "dangling"):
        for call in (directory.get, directory.size, lambda key: directory.put(key, b""), directory.leased,
                     lambda key: directory.lease(key, b"note"), directory.delete):  # fmt: skip
            with pytest.raises(DamagedStore, match="is a symbolic link, which may lead out of the store"):
                call(key)
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert not (tmp_path / "nothing").exists()


def test_make_says_what_the_file_system_said(directory):
    directory.put("file", b"")
    with pytest.raises(InputError, match=r"cannot create .*file.*: (Not a directory|File exists); choose a folder"):
        Directory(directory.path / "file").make()


class Refused(OSError):
    pass


def refuse(*_):
    raise Refused("no space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_put_that_fails_leaves_the_old_file_and_nothing_else(directory, monkeypatch, call):
    directory.put("a", b"old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(Refused):
        directory.put("a", b"new")
    with pytest.raises(Refused):
        directory.put("b", b"new")
    assert everything(directory) == ["a"]
    assert directory.get("a") == b"old"


def test_sweep_removes_temporary_files_at_any_depth_and_nothing_else(directory):
    for key in (f"{TEMPORARY}1", f"a/b/{TEMPORARY}2", "a/b/c", ".LEASE"):
        directory.put(key, b"x")
    directory.sweep()
    assert everything(directory) == [".LEASE", "a/b/c"]


# --- durability ------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The calls that decide what a power cut leaves, in order: fsync of a path, rename of a file to a path."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("only Linux tells the path of an open file")
    seen = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def log_fsync(handle):
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def log_replace(source, target):
        seen.append(("replace", str(source), str(target)))
        replace(source, target)

    def log_rename(source, target):
        seen.append(("rename", str(source), str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    monkeypatch.setattr(os, "rename", log_rename)
    return seen


def test_put_makes_the_bytes_durable_before_the_rename(directory, calls):
    directory.put("a", b"x")
    (fsync, temporary), (replace, source, target) = calls
    assert (fsync, replace) == ("fsync", "replace")
    assert temporary == source
    assert target == str(directory.path / "a")


def test_a_file_that_nothing_depends_on_is_not_synced(directory, calls):
    directory.put("a", b"x", durable=False)
    directory.sync()
    assert [call[0] for call in calls] == ["replace"]


def test_sync_makes_new_names_durable_also_those_of_folders_once(directory, calls):
    directory.put("a/b/c", b"x")
    directory.put("a/b/d", b"x")
    calls.clear()
    directory.sync()
    root = str(directory.path)
    assert {path for _, path in calls} == {root, f"{root}/a", f"{root}/a/b"}
    calls.clear()
    directory.sync()
    assert calls == []


def test_publish_shows_all_files_of_a_folder_at_once_and_for_good(tmp_path, calls):
    target = Directory(tmp_path / "new" / "runs")
    target.make()
    built = Directory(target.path / ".new-1-a")
    built.put("g/x", b"1")
    built.put("y", b"2")
    calls.clear()
    target.publish(built, "a")
    assert everything(target) == ["a/g/x", "a/y"]
    names = [call[0] for call in calls]
    rename = names.index("rename")
    assert {path for _, path in calls[:rename]} == {str(built.path), str(built.path / "g")}
    # The folders above are new as well, and a name in one that is lost is lost.
    assert {path for _, path in calls[rename + 1 :]} == {str(tmp_path), str(tmp_path / "new"), str(target.path)}


# --- the lease -------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pipeline.disk import Directory
lease = Directory(sys.argv[1]).lease("LEASE", b"process 7 on mars")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(directory):
    """Another process that holds the lease."""
    command = [sys.executable, "-c", HOLDER, str(directory.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lease_is_refused_by_name_while_another_process_holds_it(directory, holder):
    assert directory.leased("LEASE")
    message = f"{directory.path.name} is being written by process 7 on mars; wait for it or stop it"
    with pytest.raises(RunLocked, match=re.escape(message)):
        directory.lease("LEASE", b"me")
    holder.kill()
    holder.wait()
    assert not directory.leased("LEASE")
    with directory.lease("LEASE", b"me"):
        assert directory.get("LEASE") == b"me"
        assert directory.leased("LEASE")
    assert not directory.leased("LEASE")


def test_a_lease_can_be_waited_for(directory, holder):
    holder.stdin.close()  # lets the holder end
    directory.lease("LEASE", b"me", wait=True).release()


def test_a_shorter_note_replaces_a_longer_one(directory):
    directory.lease("LEASE", b"a long note").release()
    directory.lease("LEASE", b"short").release()
    assert directory.get("LEASE") == b"short"


def test_releasing_twice_is_harmless_and_a_lease_without_a_holder_names_nobody(directory):
    lease = directory.lease("LEASE", b"")
    with pytest.raises(RunLocked, match="is being written by another process"):
        directory.lease("LEASE", b"me")
    lease.release()
    lease.release()
    assert not directory.leased("LEASE")


def test_nothing_is_leased_where_nothing_is(directory):
    assert not directory.leased("LEASE")
    assert everything(directory) == []


FORKED = """
import os, sys
from pipeline.disk import Directory
directory = Directory(sys.argv[1])
lease = directory.lease("LEASE", b"parent")
read, write = os.pipe()
if os.fork() == 0:  # holds a copy of the open file until the pipe closes
    os.close(write)
    os.read(read, 1)
    os._exit(0)
os.close(read)
lease.release()
print("leased" if directory.leased("LEASE") else "free")
"""


def test_a_child_process_does_not_keep_a_lease_that_was_given_back(directory):
    command = [sys.executable, "-c", FORKED, str(directory.path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "free\n"


def test_readers_who_look_do_not_turn_a_writer_away(directory):
    directory.put("LEASE", b"")
    handle = os.open(directory.path / "LEASE", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)

    def let_go(_):
        fcntl.flock(handle, fcntl.LOCK_UN)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.disk.time.sleep", let_go)
        directory.lease("LEASE", b"me").release()
    os.close(handle)
