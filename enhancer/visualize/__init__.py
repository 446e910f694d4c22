"""One interactive page, and pictures for papers, of what teacher and students see in a clip.

views.py says what a page can show; stored.py reads it off a prior's file, look_again.py, students.py and codec.py
find it out, gather.py and runs.py bring it together; encode.py and page.py write the page, figures.py and pieces.py
the pictures.
"""
