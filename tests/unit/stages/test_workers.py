"""Arguments passed to workers."""

from __future__ import annotations

import pickle

from job.config.load import load_settings
from job.stages.workers import _without_targets


def test_no_address_of_a_target_goes_to_other_machines() -> None:
    given = ['s3.endpoint="https://me:hidden@host"', 'upload=["s3://hidden/bucket"]', 'checkpoint="s3://hidden/state"']
    settings = load_settings({"model": "me/model"}, assignments=given).settings
    assert b"hidden" in pickle.dumps(settings)
    assert b"hidden" not in pickle.dumps(_without_targets(settings))
    assert _without_targets(settings).scoring == settings.scoring
