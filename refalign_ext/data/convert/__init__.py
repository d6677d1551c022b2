"""From the files of public data sets, and from folders of one's own, to the manifest of `refalign_ext.data.schema`."""
