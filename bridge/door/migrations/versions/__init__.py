"""One file a form; a form that was released is never changed."""
