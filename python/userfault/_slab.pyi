# Everything in it is for cimport.
