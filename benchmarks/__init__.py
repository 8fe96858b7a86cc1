"""Every method of the field on the same teachers, cuts, images and seeds. Imports mimicut, never the reverse."""
