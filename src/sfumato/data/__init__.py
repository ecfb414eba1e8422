"""From folders of pictures to batches; knows no model family."""
