"""Training objectives as data: ids in, examples out, in numpy; and the Grain pipelines around them."""
