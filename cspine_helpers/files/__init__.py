"""How any file is named, replaced in one step, checked and read."""

from cspine_helpers.files.paths import cohort_dir, listing, run_dir
