#!/bin/sh
# `magicdec serve` with these flags. Without --model the default model is fetched first, once per volume.
set -eu
case " $* " in
    *" --model "* | *" --model="* | *" --help "*) ;;
    *) grep -qs '^ *model: default' "$(echo " $* " | sed -n 's/.* --config \([^ ]*\) .*/\1/p')" && magicdec fetch ;;
esac
exec magicdec serve "$@"
