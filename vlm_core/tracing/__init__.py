"""Where information flows: which tokens, layers and edges an answer needs.

``places``       token groups of prompts: an object's image tokens and the others, the question, the tokens of the chat template after it
``patching``     activation patching by layer, place and head: what suffices for an answer, what is necessary
``windows``      attention edges cut in windows of layers
``sequence``     the depth at which text and image arrive where the answer is read
``background``   what the image tokens beside an object tell about it
``object_tokens``  what an answer loses with the tokens of its object, against random, high-norm and gradient tokens
``lens_tracks``   an object's word in the logit lens of its own tokens, layer by layer
``shares``       a part of an effect over the whole of it, pooled over items
"""
