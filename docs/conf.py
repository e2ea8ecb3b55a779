"""Settings of the site of the documents: `make docs` builds it into site/, and fails at a link that leads nowhere."""

project = "lte"
author = "the authors of lte"
html_title = "lte"
html_theme = "furo"
extensions = ["myst_parser"]
myst_heading_anchors = 4
exclude_patterns = ["*.jsonl"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
highlight_language = "none"
