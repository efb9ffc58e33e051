"""What the browser tool is made of: pages as text, a guarded fetcher, search back ends, an index of local files.

page.py         a page as the model sees it: wrapped, numbered lines, links, what of it was searched for
citations.py    `【6†L9-L11】` in an answer to url_citation annotations
page_text.py    HTML, PDF, Markdown and text to that form; runs in the child alone
parse_child.py  the process with limits in which everything that was fetched is parsed
guard.py        which URLs and addresses may be reached at all
fetch.py        HTTP over connections to addresses that the guard has checked
backend.py      what a back end is, and which one a setting names
search_api.py   Exa, You.com, Brave, Tavily, SearXNG
local_index.py  a folder of files, indexed on disk
"""
