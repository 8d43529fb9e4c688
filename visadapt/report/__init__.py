"""Reports of experiments' results: figures, tables, Markdown and one HTML page."""

from visadapt.report.assembly import Report as Report
from visadapt.report.assembly import build as build
from visadapt.report.html_page import page as page
from visadapt.report.markdown_page import markdown as markdown
from visadapt.report.scatter import plot as plot
from visadapt.report.section import Claim as Claim
from visadapt.report.section import Section as Section
from visadapt.report.style import Drawing as Drawing
from visadapt.report.style import Look as Look
from visadapt.report.tables import sweep_table as sweep_table
from visadapt.report.tables import table as table
from visadapt.report.writing import write as write
