#!/bin/sh
# `magicdec serve` with these flags. The default models are fetched first where one of them is served, once per volume.
set -eu
case " $* " in
    *" --help "*) ;;
    *" --model default "* | *" --model=default "* | *" --model default-int4 "* | *" --model=default-int4 "*) magicdec fetch ;;
    *" --model "* | *" --model="*) ;;
    *) grep -qs '^ *model: default' "$(echo " $* " | sed -n 's/.* --config \([^ ]*\) .*/\1/p')" && magicdec fetch ;;
esac
exec magicdec serve "$@"
