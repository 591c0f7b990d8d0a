"""Choice maps: values of choices by address.

========================  =====================================================================
`EmptyChoiceMap`          no choice
`ValueChoiceMap`          one choice, at the root
`BuiltinChoiceMap`        choice maps by name
`VectorChoiceMap`         choices of the elements of a vector: ``indices``, and an inner choice map whose values
                          have one more leading axis
========================  =====================================================================

`choice_map` makes them from nested dicts; plain nested dicts are accepted wherever a choice map is.
"""

from gjflax.core.choice_map.base import BuiltinChoiceMap as BuiltinChoiceMap
from gjflax.core.choice_map.base import ChoiceMap as ChoiceMap
from gjflax.core.choice_map.base import EmptyChoiceMap as EmptyChoiceMap
from gjflax.core.choice_map.base import ValueChoiceMap as ValueChoiceMap
from gjflax.core.choice_map.base import by_name as by_name
from gjflax.core.choice_map.masks import masked as masked
from gjflax.core.choice_map.nested_dicts import choice_map as choice_map
from gjflax.core.choice_map.vectors import VectorChoiceMap as VectorChoiceMap
from gjflax.core.choice_map.vectors import has_vector as has_vector
from gjflax.core.choice_map.vectors import vector as vector
