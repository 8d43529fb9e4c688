"""Reports: what the results of experiments say, as figures, tables, Markdown and one HTML page."""

from visadapt.report.build import Report as Report
from visadapt.report.build import build as build
from visadapt.report.look import Drawing as Drawing
from visadapt.report.look import Look as Look
from visadapt.report.markdown import markdown as markdown
from visadapt.report.page import page as page
from visadapt.report.section import Claim as Claim
from visadapt.report.section import Section as Section
from visadapt.report.size import plot as plot
from visadapt.report.tables import sweep_table as sweep_table
from visadapt.report.tables import table as table
from visadapt.report.write import write as write
