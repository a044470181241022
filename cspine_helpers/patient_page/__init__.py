"""One patient's answer on one page: what is called, how sure, where the model looked, what that is worth."""

from cspine_helpers.patient_page.cases import choose_cases
from cspine_helpers.patient_page.chooser import CaseChooser
from cspine_helpers.patient_page.page import PatientPages
from cspine_helpers.patient_page.scan import Scan, read_scan
