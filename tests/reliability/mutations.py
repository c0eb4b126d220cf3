"""Every protection of a store, how to switch it off by changing one place of the source, and the tests that notice.

A protection that can be switched off without a test that fails is one that nobody would miss when it is gone.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One protection switched off.

    Attributes:
        name: what is then missing.
        file: the module, from the root of the repository.
        text: source that occurs there once.
        instead: what stands in its place.
        tests: node ids of functions that must fail then, as far as `make test` runs them.
    """

    name: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]


DISK, OBJECTS, STORE = "pipeline/disk.py", "pipeline/objects.py", "pipeline/store.py"
VERIFY, REPAIR, ZARR3, GUARD = "pipeline/verify.py", "pipeline/repair.py", "pipeline/zarr3.py", "pipeline/guard.py"
OF_DISK, OF_OBJECTS = "tests/pipeline/test_disk.py", "tests/pipeline/test_objects.py"
OF_STORE, OF_BUCKET = "tests/pipeline/test_store.py", "tests/pipeline/test_store_objects.py"
OF_VERIFY, OF_REPAIR = "tests/pipeline/test_verify.py", "tests/pipeline/test_repair.py"
OF_ZARR3, OF_SPECTRA = "tests/pipeline/test_zarr3.py", "tests/pipeline/test_spectra.py"
OF_RECORD, OF_CATALOG = "tests/pipeline/test_record.py", "tests/analysis/test_catalog.py"
PROTECTIONS, ATTACKS = "tests/reliability/test_protections.py", "tests/reliability/test_attacks.py"
FAILING_DISK = "tests/reliability/test_failing_disk.py::test_a_run_survives_a_failure_at_every_operation"
POWER_CUT = "tests/reliability/test_power_cut.py::test_what_was_committed_survives_a_power_cut_at_any_operation"

MUTATIONS = [
    # --- files appear whole, and last what others depend on -----------------------------------------------------------
    Mutation(
        "bytes are not fsynced before the rename",
        DISK,
        "os.fsync(file.fileno())",
        "pass",
        (f"{OF_DISK}::test_put_makes_the_bytes_durable_before_the_rename", POWER_CUT),
    ),
    Mutation(
        "folders are not fsynced",
        DISK,
        "                _fsync_directory(folder)\n",
        "                pass\n",
        (f"{OF_DISK}::test_sync_makes_new_names_durable_also_those_of_folders_once", POWER_CUT),
    ),
    Mutation(
        "the folders of a new run are not fsynced",
        DISK,
        "_fsync_directory(Path(folder))",
        "pass",
        (f"{OF_DISK}::test_publish_shows_all_files_of_a_folder_at_once_and_for_good",),
    ),
    Mutation(
        "files are written in place",
        DISK,
        'temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"',
        "temporary = target",
        (f"{OF_DISK}::test_a_put_that_fails_leaves_the_old_file_and_nothing_else",),
    ),
    Mutation(
        "a temporary file of a killed writer stays",
        STORE,
        "            directory.sweep()\n",
        "",
        (f"{PROTECTIONS}::test_whoever_takes_a_run_up_removes_what_was_half_written",),
    ),
    Mutation(
        "the record is published before the chunks",
        STORE,
        "            for group, rows in self._pending.items():\n                if lengths",
        "            before = self._lengths\n"
        "            self._publish(lengths, commits=commits)\n"
        "            self._lengths = before\n"
        "            for group, rows in self._pending.items():\n                if lengths",
        (FAILING_DISK,),
    ),
    Mutation(
        "a finished run says so before its copies of the metadata are right",
        STORE,
        "self._publish(self._lengths, record_last=True, ",
        "self._publish(self._lengths, ",
        (f"{OF_STORE}::test_a_run_is_finished_only_when_every_copy_of_its_metadata_is_right",),
    ),
    Mutation(
        "the checkpoint is overwritten in place",
        STORE,
        'f"checkpoint-{commits % 2}.safetensors"',
        '"checkpoint-0.safetensors"',
        (FAILING_DISK,),
    ),
    Mutation(
        "a writer goes on after a commit that failed",
        STORE,
        "        if self._broken:",
        "        if False:",
        (f"{OF_STORE}::test_a_writer_whose_commit_failed_says_so_and_the_next_one_goes_on",),
    ),
    Mutation(
        "a run that goes on forgets the rows of its shared chunks",
        STORE,
        "cls(directory, lease, run)._restore_tails(run)",
        "cls(directory, lease, run)",
        (f"{OF_STORE}::test_a_run_that_was_interrupted_in_every_way_has_the_same_head_and_the_same_bytes",),
    ),
    Mutation(
        "a row is not copied when it is appended",
        STORE,
        ".astype(array.dtype)\n            if value.shape",
        ".astype(array.dtype, copy=False)\n            if value.shape",
        (f"{OF_STORE}::test_a_row_is_what_it_was_when_it_was_appended",),
    ),
    # --- one writer ---------------------------------------------------------------------------------------------------
    Mutation(
        "a run is not locked",
        DISK,
        "return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "return None",
        (
            f"{OF_DISK}::test_a_lease_is_refused_by_name_while_another_process_holds_it",
            f"{OF_STORE}::test_a_second_writer_is_refused_by_name_until_the_first_is_gone",
        ),
    ),
    Mutation(
        "creations are not locked against each other",
        DISK,
        "                fcntl.flock(handle, fcntl.LOCK_EX)\n",
        "                pass\n",
        (f"{PROTECTIONS}::test_whoever_waits_for_a_lease_gets_it_after_its_holder_and_not_before",),
    ),
    Mutation(
        "a child keeps the lock that its parent gave back",
        DISK,
        "fcntl.flock(handle, fcntl.LOCK_UN)",
        "pass",
        (f"{OF_DISK}::test_a_child_process_does_not_keep_a_lease_that_was_given_back",),
    ),
    Mutation(
        "a PUT replaces whatever is there",
        OBJECTS,
        'mode=seen or "create"',
        'mode="overwrite"',
        (
            f"{OF_OBJECTS}::test_of_two_that_ask_at_once_one_gets_it",
            f"{OF_OBJECTS}::test_who_lost_a_lease_replaces_nothing_that_it_has_not_seen",
        ),
    ),
    Mutation(
        "a writer's PUTs name no version",
        OBJECTS,
        "if self._versions is None or not durable:",
        "if True:",
        (f"{OF_OBJECTS}::test_who_lost_a_lease_replaces_nothing_that_it_has_not_seen",),
    ),
    Mutation(
        "an answer that got lost counts as a refusal",
        OBJECTS,
        "return _version(meta) if found == data else None",
        "return None",
        (f"{OF_OBJECTS}::test_a_put_that_was_done_although_it_was_refused_counts_as_done",),
    ),
    Mutation(
        "a lease is not renewed",
        OBJECTS,
        "                self._renew()\n\n    def _renew",
        "                pass\n\n    def _renew",
        (f"{OF_OBJECTS}::test_a_lease_is_renewed_while_its_holder_computes",),
    ),
    Mutation(
        "a writer does not look whether it still holds its lease",
        STORE,
        "        if not self._lease.still_held():\n            raise",
        "        if False:\n            raise",
        (f"{OF_BUCKET}::test_a_writer_that_notices_its_lost_lease_stops_before_its_next_commit",),
    ),
    Mutation(
        "whoever takes a run over leaves the record to the writer before",
        STORE,
        "            writer._fence()\n",
        "",
        (f"{OF_BUCKET}::test_a_writer_that_does_not_notice_can_harm_nothing",),
    ),
    # --- what was committed is what is read ---------------------------------------------------------------------------
    Mutation(
        "the checksum of a chunk is not looked at",
        ZARR3,
        'google_crc32c.value(packed).to_bytes(4, "little") != checksum',
        "False",
        (f"{OF_ZARR3}::test_every_flipped_bit_and_every_truncation_is_refused",),
    ),
    Mutation(
        "the digest of the record is not looked at",
        STORE,
        "    if digest != stated:",
        "    if False:",
        (f"{OF_STORE}::test_no_flipped_bit_of_the_record_is_believed",),
    ),
    Mutation(
        "the version of the format is not looked at",
        STORE,
        "    if version != schema.FORMAT_VERSION:",
        "    if False:",
        (f"{OF_STORE}::test_a_newer_format_and_an_enormous_record_are_refused",),
    ),
    Mutation(
        "the digests of rows are not looked at",
        VERIFY,
        "if None not in (stored, measured) and stored != measured:",
        "if False:",
        (
            f"{OF_VERIFY}::test_every_swap_of_two_rows_is_found_and_names_both",
            f"{OF_VERIFY}::test_a_swap_of_two_variables_is_found",
        ),
    ),
    Mutation(
        "the chain of digests is not looked at",
        VERIFY,
        "if len(links) == total and head.hex() != run.head:",
        "if False:",
        (f"{OF_VERIFY}::test_a_whole_row_that_was_replaced_with_its_digest_is_found_by_the_chain",),
    ),
    Mutation(
        "the examples are not looked at",
        VERIFY,
        'chain_seed(run.attrs["identity"], probe) != seed:',
        "False:",
        (f"{OF_VERIFY}::test_other_examples_are_found",),
    ),
    Mutation(
        "missing chunks are not looked for",
        VERIFY,
        "            if not size:\n",
        "            if False:\n",
        (f"{OF_VERIFY}::test_a_chunk_that_is_missing_or_empty_is_found_by_a_quick_look",),
    ),
    Mutation(
        "the witness of later commits is not asked",
        VERIFY,
        'if said > attrs["commits"] or',
        "if False and said > 0 or False and",
        (f"{OF_VERIFY}::test_an_older_record_that_was_put_back_is_found",),
    ),
    Mutation(
        "heads do not depend on the examples",
        STORE,
        'return blake(zarr3.to_json(identity), row_digest("probe", rows, probe))',
        "return blake(zarr3.to_json(identity))",
        (
            f"{OF_STORE}::test_the_head_covers_the_identity_and_the_probe",
            "tests/golden/test_golden.py::test_what_is_written_today_has_the_same_heads",
        ),
    ),
    Mutation(
        "heads do not depend on the identity",
        STORE,
        'return blake(zarr3.to_json(identity), row_digest("probe", rows, probe))',
        'return row_digest("probe", rows, probe)',
        (
            f"{OF_STORE}::test_the_head_covers_the_identity_and_the_probe",
            "tests/golden/test_golden.py::test_what_is_written_today_has_the_same_heads",
        ),
    ),
    Mutation(
        "a digest does not depend on the values",
        STORE,
        'digest.update(np.ascontiguousarray(part, dtype=value.dtype.newbyteorder("<")).data)',
        "pass",
        (
            f"{OF_STORE}::test_the_head_covers_every_value_but_times",
            f"{OF_STORE}::test_the_digests_of_format_1_never_change",
        ),
    ),
    Mutation(
        "a checkpoint is not held against its digest",
        STORE,
        'if blake(data).hex() != entry["digest"]:',
        "if False:",
        (f"{OF_STORE}::test_a_checkpoint_that_is_not_the_committed_one_is_refused",),
    ),
    Mutation(
        "a run goes on with other data",
        STORE,
        'if run.attrs["seed_digest"] != seed.hex():',
        "if False:",
        (f"{OF_STORE}::test_a_run_of_that_name_with_other_data_is_refused_and_left_alone",),
    ),
    # --- repair removes debris alone ----------------------------------------------------------------------------------
    Mutation(
        "repair removes committed chunks",
        REPAIR,
        'if first >= node["shape"][0]:',
        "if True:",
        (f"{OF_REPAIR}::test_debris_is_named_and_what_is_not_known_stays",),
    ),
    Mutation(
        "repair believes a record that may not be the newest",
        REPAIR,
        "        if damage:\n",
        "        if False:\n",
        (f"{OF_REPAIR}::test_rows_newer_than_a_record_that_was_put_back_are_not_debris",),
    ),
    Mutation(
        "repair works on a run that is being written",
        REPAIR,
        "    with directory.lease(LEASE, holder()) if apply else nullcontext():",
        "    with nullcontext():",
        (f"{OF_REPAIR}::test_a_run_that_is_being_written_is_left_alone",),
    ),
    Mutation(
        "repair removes something when it is only asked what there is",
        REPAIR,
        "for key in found if apply else ():",
        "for key in found:",
        (f"{OF_REPAIR}::test_the_command_shows_first_and_removes_when_told_to",),
    ),
    # --- a diverged run is a result -----------------------------------------------------------------------------------
    Mutation(
        "a row that is not finite is stored",
        STORE,
        'if value.dtype.kind == "f" and not np.isfinite(value).all():',
        "if False:",
        (
            f"{OF_STORE}::test_a_row_that_is_not_finite_is_refused_whole",
            "tests/reliability/test_divergence.py::test_every_kernel_diverges_as_a_result",
        ),
    ),
    Mutation(
        "eigensolvers get kernels that are not finite",
        "pipeline/spectra.py",
        "    if bad:\n",
        "    if False:\n",
        (f"{OF_SPECTRA}::test_no_solver_is_called_on_a_kernel_that_is_not_finite",),
    ),
    Mutation(
        "Lanczos gets products that are not finite",
        "pipeline/spectra.py",
        "if not bool(torch.isfinite(column).all()):",
        "if False:",
        (f"{OF_SPECTRA}::test_an_operator_of_a_diverged_run",),
    ),
    Mutation(
        "a diverged kernel is not refused where it is measured",
        "pipeline/measure.py",
        'if not math.isfinite(values["frobenius_norm"]):',
        "if False:",
        (f"{OF_RECORD}::test_a_diverged_run_keeps_its_rows_and_reaches_no_eigensolver",),
    ),
    Mutation(
        "the analysis decomposes kernels that are not finite",
        "analysis/linalg.py",
        "        if np.isfinite(kernel[row]).all():\n            values[row]",
        "        if True:\n            values[row]",
        ("tests/analysis/test_linalg.py::test_eigenvalues_of_a_kernel_that_is_not_finite_are_missing_and_alone",),
    ),
    Mutation(
        "rows whose change is not known count as valid",
        "analysis/phases.py",
        "(counts & np.isin(phase[rows], (EOS_RISING, EOS_FALLING))).sum()",
        "np.isin(phase[rows], (EOS_RISING, EOS_FALLING)).sum()",
        ("tests/analysis/test_phases.py::test_summary_by_hand",),
    ),
    # --- strangers ----------------------------------------------------------------------------------------------------
    Mutation(
        "a chunk of any size is taken",
        GUARD,
        "_require(chunk_bytes <= MAX_CHUNK_BYTES,",
        "_require(True,",
        (f"{ATTACKS}::test_a_forged_record_is_refused",),
    ),
    Mutation(
        "room is made for rows without files",
        STORE,
        "    if wanted > held:",
        "    if False:",
        (f"{ATTACKS}::test_rows_without_files_take_no_memory",),
    ),
    Mutation(
        "a chunk is unpacked whatever it says of its size",
        ZARR3,
        "if sizes != (expected, len(packed)) or expected > MOST_EXPANSION * len(packed):",
        "if False:",
        (
            f"{OF_ZARR3}::test_a_chunk_of_another_size_is_refused_before_anything_is_allocated",
            f"{ATTACKS}::test_a_chunk_that_would_expand_beyond_what_lz4_can_is_not_unpacked",
        ),
    ),
    Mutation(
        "a file of any size is read",
        DISK,
        "if limit is not None and file.stat().st_size > limit:",
        "if False:",
        (
            f"{OF_DISK}::test_get_says_what_it_cannot_read",
            f"{OF_STORE}::test_a_newer_format_and_an_enormous_record_are_refused",
        ),
    ),
    Mutation(
        "an object of any size is read",
        OBJECTS,
        "if limit is not None and size > limit:",
        "if False:",
        (f"{OF_BUCKET}::test_a_chunk_is_read_no_further_than_it_can_be_large",),
    ),
    Mutation(
        "any codec is taken",
        GUARD,
        "    _require(not odd, ",
        "    _require(True, ",
        (f"{ATTACKS}::test_a_forged_record_is_refused",),
    ),
    Mutation(
        "symbolic links are followed",
        DISK,
        "    if os.path.islink(path):",
        "    if False:",
        (
            f"{OF_DISK}::test_no_key_leads_through_a_symbolic_link",
            f"{ATTACKS}::test_a_symbolic_link_in_a_store_is_not_followed",
            f"{ATTACKS}::test_a_lease_that_is_a_symbolic_link_is_not_written_through",
        ),
    ),
    Mutation(
        "a key may lead out of a folder",
        DISK,
        """if not key or any(part in ("", ".", "..") or "\\0" in part for part in parts):""",
        "if False:",
        (f"{OF_DISK}::test_a_key_that_could_leave_the_folder_is_refused",),
    ),
    Mutation(
        "a key may lead out of a bucket's folder",
        OBJECTS,
        """        if any(part in ("", ".", "..") or "\\0" in part for part in key.split("/")):""",
        "        if False:",
        ("tests/pipeline/test_door.py::test_a_key_that_could_leave_the_place_is_refused",),
    ),
    Mutation(
        "a run may have any name",
        STORE,
        "        check_run_id(run_id)\n",
        "",
        (f"{ATTACKS}::test_a_run_can_only_be_created_inside_its_root",),
    ),
    Mutation(
        "a record may hold anything",
        STORE,
        "        check_record(document)\n",
        "        pass\n",
        (f"{ATTACKS}::test_a_forged_record_is_refused",),
    ),
    Mutation(
        "a result may unpack to any size",
        "analysis/results.py",
        "        if packed or sum(entry.file_size for entry in archive.infolist()) > len(data):",
        "        if False:",
        (f"{ATTACKS}::test_a_forged_result_is_refused",),
    ),
    Mutation(
        "SQL may read files",
        "analysis/catalog.py",
        '            "enable_external_access": False,\n            "memory',
        '            "memory',
        (
            f"{OF_CATALOG}::test_a_refused_query_is_one_line",
            f"{OF_CATALOG}::test_the_connection_of_a_query_refuses_by_itself",
        ),
    ),
    Mutation(
        "SQL may change settings",
        "analysis/catalog.py",
        '            "lock_configuration": True,\n',
        "",
        (f"{OF_CATALOG}::test_the_connection_of_a_query_refuses_by_itself",),
    ),
    Mutation(
        "a condition on runs may read files",
        "analysis/tables.py",
        'config={"enable_external_access": False, "lock_configuration": True}',
        "config={}",
        ("tests/analysis/test_load.py::test_a_bad_condition_is_one_line",),
    ),
    Mutation(
        "a study imports the user's code without being allowed to",
        "pipeline/config/study.py",
        "    if needs_import(study) and not allowed:",
        "    if False:",
        (
            "tests/pipeline/test_config.py::test_imports_need_permission",
            "tests/pipeline/test_cli.py::test_a_model_by_import_path_needs_permission",
        ),
    ),
    Mutation(
        "a replay imports the user's code without being allowed to",
        "pipeline/rebuild.py",
        "if isinstance(config.model, Imported) and not allow_imports:",
        "if False:",
        ("tests/pipeline/test_replay.py::test_an_imported_model_needs_permission_and_must_be_the_same",),
    ),
    Mutation(
        "a worker makes tiles of another model that has the name of the run's",
        "pipeline/replay.py",
        "    check_predictions(source, model, row, train)  # a worker",
        "    # a worker",
        ("tests/pipeline/test_remote_tiles.py::test_a_model_of_the_users_own_is_what_the_run_trained",),
    ),
    Mutation(
        "a worker makes tiles for a command that has ended",
        "pipeline/tiles.py",
        "        if name in _over:",
        "        if False:",
        ("tests/pipeline/test_remote_tiles.py::test_nothing_is_made_for_a_command_that_has_ended",),
    ),
    Mutation(
        "a replay that is refused removes the result of an earlier state of the run",
        "pipeline/replay.py",
        "    if asked.is_done:\n",
        "    asked.remove_stale()\n    if asked.is_done:\n",
        ("tests/pipeline/test_remote_tiles.py::test_what_is_refused_removes_nothing",),
    ),
    Mutation(
        "texts of a store are markup in the report",
        "analysis/report.py",
        "autoescape=True",
        "autoescape=False",
        ("tests/analysis/test_report.py::test_what_comes_from_a_store_is_text",),
    ),
    # --- memory -------------------------------------------------------------------------------------------------------
    Mutation(
        "the first kernel of a run is copied for every row",
        "analysis/rows.py",
        "rows[:1] if (rows == rows[0]).all() else rows",
        "rows",
        ("tests/analysis/test_rows.py::test_rows_in_the_place_of_others_keep_their_blocks_and_are_not_copied",),
    ),
]
