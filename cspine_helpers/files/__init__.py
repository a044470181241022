"""How any file is named, replaced in one step, checked and read."""

from cspine_helpers.files.paths import cohort_dir, link_cohort, listing, run_dir
